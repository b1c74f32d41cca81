"""A Hugging Face folder opened as a model: its family, shape, tensors, and the proof that they fit together."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megabatch.converters.families import family_of
from megabatch.converters.family import Family
from megabatch.converters.mapping import Mapped
from megabatch.converters.mxfp4 import Mxfp4
from megabatch.converters.quantised import Quantised, plain, quantised
from megabatch.converters.regular_files import read_regular
from megabatch.converters.safetensors_io import HfFolder
from megabatch.converters.safetensors_io.header import parse_object
from megabatch.did_you_mean import did_you_mean
from megabatch.errors import ConversionError
from megabatch.hub_cache import cached_folder, download_command, is_hub_name
from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class HfModel:
    """A checked folder."""

    config: dict[str, Any]
    family: Family
    shape: ModelShape
    folder: HfFolder
    tensors: list[Mapped]
    """The table over the folder's own layout of experts, in layer order."""
    ignored: dict[str, str]
    """Tensors in the folder that are not read, each with the reason."""
    carried: list[str]
    """Tensors of another part of the model (a vision tower), which no megatron-core tensor has."""
    is_bare: bool = False
    """Whether its tensors are named as a base model's (transformers' AutoModel, sentence-transformers): without
    `model.`, which they have here."""
    quantised: Quantised | Mxfp4 | None = None
    """How to dequantise its weights, for callers that accept quantised ones."""


def find_folder(model: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """A folder, or the download folder of a hub's model `organisation/name`.

    Args: revision: of the hub's model; None: the newest.
    Raises: ConversionError with the places searched, similar names, and the command that downloads the model.
    """
    path, name = Path(model).expanduser(), os.fspath(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ConversionError(f"{name}: is a file; name the folder of the model")
    if not is_hub_name(name):
        raise ConversionError(
            f"{name}: there is no folder {path.absolute()}, and it is not the name of a hub model, "
            f"organisation/name (`{download_command('organisation/name', use_hf=True)}`){did_you_mean(path)}"
        )
    folder = cached_folder(name, use_hf=True, revision=revision)
    if folder is None:
        hubs = (True, False) if revision is None else (True,)
        commands = " or ".join(f"`{download_command(name, use_hf=hub, revision=revision)}`" for hub in hubs)
        what = "it" if revision is None else f"its revision {revision}"
        raise ConversionError(
            f"{name}: there is no folder {path.absolute()}, and no hub's cache on this machine has {what}; download "
            f"it with {commands}{did_you_mean(path)}"
        )
    return folder


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's config.json. Raises: ConversionError when it is missing or no JSON object."""
    path = Path(folder) / "config.json"
    return parse_object(read_regular(path), path, what="config")


def open_hf_model(
    folder: str | os.PathLike[str],
    *,
    compare_duplicates: bool | Literal["sampled"] = True,
    accept_quantised: bool = False,
    accept_bin: bool = False,
) -> HfModel:
    """Opens a folder and checks that its tensors are exactly those of its config.json.

    `compare_duplicates` reads a tied output layer that the folder holds although it need not, and refuses it when it
    differs from the embedding: transformers would then not tie them. One rank of many is enough to do that; `sampled`
    reads a few hundred KiB of each.
    `accept_quantised` is for callers that apply the scales of block-scaled FP8 and MXFP4 weights themselves.
    `accept_bin` reads `pytorch_model.bin` where there is nothing else, as data.
    Raises: ConversionError.
    """
    config = read_config(folder)
    how = quantised(config) if accept_quantised else None
    if how is not None:
        del config["quantization_config"]
    family = family_of(config)
    shape = family.shape(config)
    # the launcher needs the rest of this module, and no pickles
    from megabatch.converters.torch_bin import open_folder

    source = open_folder(folder, accept_bin=accept_bin)
    if is_bare := _is_bare(source):
        source.under(_BASE, but=_HEADS)
        if not source.has(_HEADS[0]) and shape.untie_embeddings_and_output_weights:
            shape = replace(shape, num_labels=0)  # whatever class config.json names
    shape = family.present(shape, source.names)
    checked = family.check(shape, source.tensors if how is None else plain(source.tensors, how))
    if compare_duplicates:
        for name, of in checked.duplicates.items():
            if not source.same(name, of, sampled=compare_duplicates == "sampled"):
                raise ConversionError(f"{folder}: {_differs(name, of, tied=name in family.tied)}")
    return HfModel(config, family, shape, source, checked.tensors, checked.ignored, checked.carried, is_bare, how)


_BASE, _HEADS = "model.", ("lm_head.weight", "score.weight", "score.bias")
_EMBEDDING = "embed_tokens.weight"


def _is_bare(folder: HfFolder) -> bool:
    return folder.has(_EMBEDDING) and not folder.has(_BASE + _EMBEDDING)


def _differs(name: str, of: str, *, tied: bool) -> str:
    if tied:
        return (
            f"{name} differs from {of} though config.json has tie_word_embeddings=true; set it to false to use both, "
            f"or remove {name}"
        )
    return f"{name} differs from {of}, which a multi-token prediction layer must share: megatron-core has only one"
