"""Where a run's model comes from: a Hugging Face folder, a hub, or nowhere (made on the spot from its shape)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.config.run import RunConfig
from megabatch.converters.atomic import replacing
from megabatch.converters.families import family_named
from megabatch.converters.family import Family
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.errors import ConfigError, DataError, MegabatchError
from megabatch.trainer.data import sources
from megabatch.trainer.data import tokenizer as tokenizers
from megabatch.trainer.data.formats import conversation_of
from megabatch.trainer.model.build import Model
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import RandomWeights, load

MADE_MODEL = "model"
"""Folder in the run directory with config.json and tokenizer of a model made on the spot."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model before training."""

    family: Family
    config_folder: Path
    """config.json and the other side files, which exported folders get too."""
    tokenizer: Path
    weights: HfModel | RandomWeights

    def load(self, model: Model, ranks: Ranks) -> None:
        """Fills this rank's parameters."""
        if isinstance(self.weights, RandomWeights):
            table = self.family.tensors(model.shape)
            load(model, self.weights, table, ranks, dtype_of=self.weights.dtypes)
        else:
            folder = self.weights.folder
            dtypes = {name: info.dtype for name, info in folder.tensors.items()}
            load(model, folder, self.weights.tensors, ranks, dtype_of=dtypes)


def model_source(run: RunConfig, ranks: Ranks) -> ModelSource:
    """Finds, downloads or makes what the run starts from; collective.

    Raises: ConfigError, DataError, ConversionError on every rank.
    """
    if run.recipe.model.model is None:
        return _made(run, ranks)
    folder = ranks.on_main(lambda: _folder(run.recipe.model.model or "", run))
    tokenizer = ranks.on_main(lambda: _folder(run.recipe.model.tokenizer or str(folder), run))
    ranks.on_main(lambda: tokenizers.check(tokenizer))
    ranks.on_main(lambda: _prove(folder, run))
    opened = open_hf_model(folder, compare_duplicates=False)
    return ModelSource(opened.family, folder, tokenizer, opened)


def _prove(folder: Path, run: RunConfig) -> None:
    """One rank checks what all will rely on: the tensors, and that the shape is still what was planned for."""
    opened = open_hf_model(folder)
    if opened.shape != run.shape:
        old, new = run.shape, opened.shape
        names = [n for n in old.__slots__ if n != "hf_config" and getattr(old, n) != getattr(new, n)]
        if names:
            changes = ", ".join(f"{n} {getattr(old, n)} → {getattr(new, n)}" for n in names)
            raise ConfigError(f"{folder}/config.json is not the one that this run was planned with: {changes}")


def _folder(name: str, run: RunConfig) -> Path:
    """A local folder, or the download of a hub's."""
    if Path(name).is_dir():
        return Path(name)
    bridge = run.recipe.bridge
    token = os.environ.get(bridge.hub_token) if bridge.hub_token else None
    try:
        if bridge.use_hf:
            from huggingface_hub import snapshot_download as hf_download

            return Path(hf_download(name, token=token))
        from modelscope import snapshot_download as ms_download

        return Path(ms_download(name, token=token))
    except ImportError as e:
        raise ConfigError(
            f"model.model={name!r} is no folder here and bridge.use_hf=False asks ModelScope's hub, whose package is "
            "not installed; pip install modelscope, or set use_hf=True for Hugging Face's hub"
        ) from e
    except Exception as e:  # hubs raise a dozen kinds for what is always: it could not be downloaded
        raise ConfigError(
            f"model.model={name!r} is no folder here and cannot be downloaded ({type(e).__name__}: "
            f"{str(e).strip().splitlines()[0]}); download it where there is a network and give its folder"
        ) from e


def _made(run: RunConfig, ranks: Ranks) -> ModelSource:
    family = family_named(run.shape.model_type)
    folder = Path(run.run_dir) / MADE_MODEL
    given = run.recipe.model.tokenizer
    tokenizer = ranks.on_main(lambda: _folder(given, run) if given else _trained_tokenizer(run, folder))
    ranks.on_main(lambda: _write_config(run, family, folder, tokenizer))
    return ModelSource(family, folder, tokenizer, RandomWeights(family, run.shape, seed=run.recipe.training.seed))


def _trained_tokenizer(run: RunConfig, folder: Path) -> Path:
    """A byte-level BPE of the training data's text, kept for the runs that follow a requeue."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
    data = run.recipe.data
    texts = [
        message.content
        for source in sources.resolve(data.dataset, use_hf=run.recipe.bridge.use_hf)
        for row in source.rows(seed=run.recipe.training.seed, shuffle=data.dataset_shuffle)
        for message in conversation_of(row, columns=data.columns, system=data.system).messages
    ]
    return tokenizers.train_bpe(texts, vocab_size=run.shape.vocab_size, out_dir=folder)


def _write_config(run: RunConfig, family: Family, folder: Path, tokenizer: Path) -> None:
    loaded: Any = tokenizers.load(tokenizer)
    if len(loaded) > run.shape.vocab_size:
        raise DataError(
            f"model.tokenizer: {tokenizer} has {len(loaded)} tokens, above model.padded_vocab_size="
            f"{run.shape.vocab_size}; try {len(loaded)} or more"
        )
    tokens = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = family.hf_config(run.shape, dtype=run.recipe.model.torch_dtype or "float32", **tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "config.json") as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
        if tokenizer != folder:
            loaded.save_pretrained(folder)
    except OSError as e:
        raise MegabatchError(f"{folder} cannot be written: {e.strerror or e}") from e
