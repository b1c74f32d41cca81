"""Saving the trained adapter as a PEFT folder: the ranks hand their parts to the main rank, which writes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabatch.config.run import RunConfig
from megabatch.config.tuner import Tuner
from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.config import NAME
from megabatch.converters.adapters.names import whole_name
from megabatch.converters.adapters.peft_config import written
from megabatch.converters.adapters.peft_experts import Adapted, expert_leaves
from megabatch.converters.adapters.peft_folder import WEIGHTS
from megabatch.converters.adapters.targets import Target, hf_names
from megabatch.converters.atomic import noting, replacing
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.families import family_named
from megabatch.converters.family import Family
from megabatch.converters.mapping import Mapped, elements
from megabatch.converters.safetensors_io import Writer
from megabatch.converters.shards import HfRows
from megabatch.errors import MegabatchError
from megabatch.plan.shape import ModelShape
from megabatch.saved.manifest import File
from megabatch.trainer.exports.chat import ChatExport
from megabatch.trainer.exports.export import Export
from megabatch.trainer.exports.hugging_face import chat_of
from megabatch.trainer.model.build import Model
from megabatch.trainer.model.lora.layers import TRAINED
from megabatch.trainer.model.lora.lora import Lora
from megabatch.trainer.model.tuning import Tuning
from megabatch.trainer.model_source import ModelSource, base_of_adapter
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import SAFETENSORS_DTYPES, export

Made = tuple[TensorInfo, bytearray]
"""A tensor of an adapter's folder."""
ROUND_BYTES = 256 << 20
"""How much a rank sends to the main rank at a time."""


@dataclass(frozen=True, slots=True)
class PeftExport(Export):
    """How this run's adapter becomes a folder that peft loads."""

    family: Family
    tuner: Tuner
    base: str | None
    """The base model of the adapter, as the recipe names it, or its folder."""
    config_folder: Path
    chat: ChatExport

    def save(self, model: Model, ranks: Ranks, directory: Path) -> dict[str, File]:
        written: dict[str, File] = {}
        error: MegabatchError | None = None
        try:
            written = self.copied(model, ranks)(directory)
        except MegabatchError as e:
            error = e
        ranks.raise_together(error)
        return written

    def copied(self, model: Model, ranks: Ranks) -> Callable[[Path], dict[str, File]]:
        tensors: dict[str, Made] = {}
        for part in _rounds(_own_tensors(model, self.family, ranks), ranks):
            for one in ranks.gather_on_main(part) or ():
                tensors |= one
        shape, tuning, is_main = model.shape, model.tuning, ranks.is_main

        def write(directory: Path) -> dict[str, File]:
            return self._write(directory, tensors, tuning, shape) if is_main else {}

        return write

    def _write(
        self, directory: Path, tensors: Mapping[str, Made], tuning: Tuning, shape: ModelShape
    ) -> dict[str, File]:
        text = config_text(self.tuner, tuning, Tables(self.family, shape), base=self.base)
        with Writer(directory / WEIGHTS, {name: info for name, (info, _) in sorted(tensors.items())}) as writer:
            for name, (_, data) in tensors.items():
                writer.write(name, data)
        try:
            with noting() as found:
                self.chat.write(self.config_folder, directory)
                self.chat.keep_class(directory)
                with replacing(directory / NAME) as file:
                    file.write(text)
        except OSError as e:
            raise MegabatchError(f"{directory} cannot be written: {e}") from e
        return {WEIGHTS: writer.digests(), **{p.relative_to(directory).as_posix(): f for p, f in found.items()}}


def peft_export(run: RunConfig, source: ModelSource) -> PeftExport:
    """The export of a run's adapter."""
    family = family_named(run.shape.model_type)
    return PeftExport(family, run.recipe.tuner, base_of_adapter(run), source.config_folder, chat_of(run, source))


def config_text(tuner: Tuner, tuning: Tuning, tables: Tables, *, base: str | None, for_peft: bool = True) -> bytes:
    """adapter_config.json. Raises: ConversionError if PEFT would load another model than was trained."""
    lora = _lora(tuning)
    leaves = expert_leaves(tables) if tables.stacks else set()
    adapted = [_adapted(target, part, lora.scale, leaves) for target in lora.targets for part in target.parts]
    in_experts = any(target.weight.expert is not None for target in lora.targets)
    # PEFT drops nothing of the inputs of parameters, which experts' layers are to it, and refuses to be asked to
    dropout = 0.0 if in_experts or any(one.parameter for one in adapted) else tuner.lora_dropout
    whole = sorted(name for name in hf_names(tuning.table, tuning.trained) if not name.endswith(".bias"))
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _task_type(tables.shape),
        "base_model_name_or_path": base,
        "r": tuner.lora_rank,
        "lora_alpha": tuner.lora_alpha,
        "lora_dropout": dropout,
        "use_rslora": tuner.use_rslora,
        "bias": tuner.lora_bias,
        "modules_to_save": list(dict.fromkeys(name.removesuffix(".weight") for name in whole)) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if tuner.init_lora_weights == "kaiming" else tuner.init_lora_weights,
    }
    return written(values, adapted, tables, for_peft=for_peft)


def _task_type(shape: ModelShape) -> str:
    if not shape.num_labels:
        return "CAUSAL_LM"
    return "TOKEN_CLS" if shape.head_bias else "SEQ_CLS"


def _lora(tuning: Tuning) -> Lora:
    assert tuning.lora is not None, "a run with PEFT's export has adapters"
    return tuning.lora


def _adapted(target: Target, part: str, scale: float, expert_leaves: Collection[str]) -> Adapted:
    """A layer in PEFT's terms: a module, or its weight where PEFT would not take the module for a layer, or would take
    it for one of the experts' (`peft_experts`)."""
    is_router = target.weight.name.endswith("mlp.router.weight")
    like_an_expert = target.weight.expert is None and part.rpartition(".")[2] in expert_leaves
    parameter = is_router or like_an_expert
    return Adapted(f"{part}.weight" if parameter else part, target.rank, scale, parameter)


def _own_tensors(model: Model, family: Family, ranks: Ranks) -> dict[str, Made]:
    """The trained tensors that this rank owns, in PEFT's form; collective."""
    tuning, dtype = model.tuning, model.config.params_dtype
    lora = _lora(tuning)
    shapes = {name: dims for target in lora.targets for name, dims in target.peft_shapes().items()}
    found = _gathered(export(model, lora.table, ranks, adapter=TRAINED), shapes, dtype)
    for name in {piece.hf for target in lora.targets if target.is_embedding for piece in target.a.pieces}:
        if name in found:
            found[name] = _transposed(*found[name], dtype)
    if not tuning.trained:
        return found
    rows = export(model, tuning.table, ranks, only=tuning.trained)
    own = _gathered(rows, family.hf_tensors(model.shape), dtype)
    adapted = {part for target in lora.targets for part in target.parts}
    names = {name: whole_name(name, wrapped=name.rpartition(".")[0] in adapted) for name in own}
    return found | {names[name]: tensor for name, tensor in own.items()}


def _gathered(
    tensors: Iterable[tuple[Mapped, Iterable[HfRows]]], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Made]:
    """Tensors in one piece each."""
    found: dict[str, Made] = {}
    for _, rows in tensors:
        for row in rows:
            shape = shapes[row.hf]
            info = TensorInfo(SAFETENSORS_DTYPES[dtype], shape)
            _, data = found.setdefault(row.hf, (info, bytearray(elements(shape) * dtype.itemsize)))
            start = row.row_start * elements(shape[1:]) * dtype.itemsize
            data[start : start + row.data.nbytes] = row.data
    return found


def _transposed(info: TensorInfo, data: bytearray, dtype: torch.dtype) -> Made:
    turned = torch.frombuffer(data, dtype=dtype).view(info.shape).t().contiguous()
    return TensorInfo(info.dtype, tuple(turned.shape)), bytearray(turned.view(-1).view(torch.uint8).numpy())


def _rounds(mine: Mapping[str, Made], ranks: Ranks) -> Iterator[dict[str, Made]]:
    """This rank's tensors in rounds; every rank has as many rounds as the rank with the most data."""
    rounds: list[dict[str, Made]] = [{}]
    size = 0
    for name, made in mine.items():
        if size and size + len(made[1]) > ROUND_BYTES:
            rounds.append({})
            size = 0
        rounds[-1][name] = made
        size += len(made[1])
    most = torch.tensor(len(rounds))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return iter([*rounds, *({} for _ in range(int(most) - len(rounds)))])
