"""Weights between Hugging Face tensors and live megatron-core shards, through the converters' tables.

Loading reads only the bytes that this rank needs. Exporting gathers one tensor at a time over its tensor-parallel
group; the ranks that own tensors write their own files in parallel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabatch.converters.mapping import Mapped
from megabatch.converters.shards import HfRows, Source, assemble, read_shard, shard_shape
from megabatch.errors import ConversionError
from megabatch.trainer.model.build import Model
from megabatch.trainer.model.lora.layers import TRAINED, merged_weights
from megabatch.trainer.model.naming import named_parameters
from megabatch.trainer.ranks import Ranks

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""safetensors' dtype names → torch dtypes, for weights."""
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Placed:
    """A live parameter and its row of the table."""

    mapped: Mapped
    parameter: nn.Parameter
    is_copy: bool
    """Whether another pipeline stage owns it (the output layer of tied embeddings)."""


def placed(model: Model, table: Sequence[Mapped], ranks: Ranks, *, adapter: str | None = None) -> list[Placed]:
    """This rank's parameters with their mappings, in model order: the base model's, or one adapter's.

    Raises: ConversionError naming a parameter that has no row in the table.
    """
    rows = {(mapped.name, mapped.expert): mapped for mapped in table}
    experts = (model.shape.num_experts or 0) // ranks.ep_size
    found = []
    first = ranks.ep_rank * experts
    for name, expert, parameter in named_parameters(model.chunks, first_expert=first, adapter=adapter):
        copy = name == "output_layer.weight" and model.shape.ties_output_layer
        key = "embedding.word_embeddings.weight" if copy else name
        if (key, expert) not in rows:
            raise ConversionError(
                f"{name} (expert {expert}) {list(parameter.shape)} of {model.shape.architecture} has no row in the "
                f"table of its family; the table has {len(rows)} tensors"
            )
        found.append(Placed(rows[key, expert], parameter, copy))
    return found


def load(
    model: Model,
    source: Source,
    table: Sequence[Mapped],
    ranks: Ranks,
    *,
    dtype_of: Mapping[str, str],
    adapter: str | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Loads this rank's parameters, or one adapter's, from the source; reads only this rank's bytes.

    Args: dtype_of: safetensors' dtype name of each Hugging Face tensor; only: canonical names, None for all.
    """
    with torch.no_grad():
        for item in placed(model, table, ranks, adapter=adapter):
            if only is not None and item.mapped.name not in only:
                continue
            item.parameter.copy_(_read(item.mapped, source, ranks, dtype_of, model.padded_vocab_size))


def prove_complete(model: Model, table: Sequence[Mapped], ranks: Ranks, *, adapter: str | None = None) -> None:
    """Checks that every tensor of the table has a live parameter on some rank; collective.

    Raises: ConversionError naming the tensors that would otherwise be dropped silently.
    """
    mine = [
        (item.mapped.name, item.mapped.expert)
        for item in placed(model, table, ranks, adapter=adapter)
        if in_first_replica(item.mapped, ranks) and tensor_split(item.mapped, ranks)[0] == 0
    ]
    everyone: list[list[tuple[str, int | None]]] = [[] for _ in range(ranks.place.world_size)]
    dist.all_gather_object(everyone, mine)
    live = {key for keys in everyone for key in keys}
    missing = [mapped for mapped in table if (mapped.name, mapped.expert) not in live]
    if missing:
        names = ", ".join(f"{mapped.name} {list(mapped.shape)}" for mapped in missing[:3])
        raise ConversionError(
            f"{len(missing)} of {len(table)} tensors of {model.shape.architecture} have no parameter in the model of "
            f"megatron-core, for example {names}; set kernels.transformer_impl=local or report the model"
        )


def _read(mapped: Mapped, source: Source, ranks: Ranks, dtype_of: Mapping[str, str], vocab: int) -> Tensor:
    rank, size = tensor_split(mapped, ranks)
    padded = vocab if mapped.split == "vocab" else None
    dtype = TORCH_DTYPES[dtype_of[next(mapped.pieces).hf]]
    data = read_shard(source, mapped, tp_rank=rank, tp_size=size, padded_vocab=padded)
    return torch.frombuffer(data, dtype=dtype).view(shard_shape(mapped, tp_size=size, padded_vocab=padded))


def tensor_split(mapped: Mapped, ranks: Ranks) -> tuple[int, int]:
    """(rank, size) of the tensor-parallel split of a tensor; expert tensors use expert tensor parallelism."""
    if mapped.expert is not None:
        return ranks.etp_rank, ranks.etp_size
    return ranks.tp_rank, ranks.tp_size


def export(
    model: Model,
    table: Sequence[Mapped],
    ranks: Ranks,
    *,
    adapter: str | None = None,
    only: Collection[str] | None = None,
) -> Iterator[tuple[Mapped, Iterator[HfRows]]]:
    """Yields the Hugging Face rows of every tensor that this rank owns, one tensor at a time: those of the model with
    the adapter in use merged in, or those of one adapter alone.

    A tensor's owner is the first rank of its tensor-parallel group in the first data-parallel replica. Every rank must
    exhaust the iterator: ranks that own nothing still take part in the gathers.
    Args: only: canonical names, None for all.
    """
    items = placed(model, table, ranks, adapter=adapter)
    return export_placed(model, [item for item in items if only is None or item.mapped.name in only], ranks)


def export_placed(
    model: Model, items: Sequence[Placed], ranks: Ranks, *, replicas: Literal["first", "all"] = "first"
) -> Iterator[tuple[Mapped, Iterator[HfRows]]]:
    """`export` for some of this rank's parameters. Every rank of a tensor-parallel group passes the same ones.

    Args: replicas: which data-parallel replicas export; all of them, where each wants its own copy.
    """
    adapters = merged_weights(model.chunks)
    for item in items:
        if item.is_copy or not (replicas == "all" or in_first_replica(item.mapped, ranks)):
            continue
        rank, size = tensor_split(item.mapped, ranks)
        padded = model.padded_vocab_size if item.mapped.split == "vocab" else None
        tensor = item.parameter.detach()
        if item.parameter in adapters:
            with torch.no_grad():
                tensor = adapters[item.parameter].merged(tensor)
        shards = _gather(tensor, item.mapped, rank, size, ranks)
        if rank == 0:
            itemsize = item.parameter.element_size()
            yield item.mapped, assemble(item.mapped, shards, itemsize=itemsize, padded_vocab=padded)


def in_first_replica(mapped: Mapped, ranks: Ranks) -> bool:
    if mapped.expert is not None:
        return int(ranks.state.get_expert_data_parallel_rank()) == 0
    return int(ranks.state.get_data_parallel_rank(with_context_parallel=True)) == 0


def parameters_norm(model: Model, table: Sequence[Mapped], ranks: Ranks) -> float:
    """L2 norm of all parameters of the model and of its trained adapter, each counted once; collective."""
    total = torch.zeros((), dtype=torch.float64)
    lora = model.tuning.lora
    adapter = [] if lora is None else placed(model, lora.table, ranks, adapter=TRAINED)
    for item in [*placed(model, table, ranks), *adapter]:
        is_owned = tensor_split(item.mapped, ranks)[0] == 0 or item.mapped.split != "replicated"
        if is_owned and not item.is_copy and in_first_replica(item.mapped, ranks):
            total += item.parameter.detach().double().square().sum().cpu()
    dist.all_reduce(total)
    return float(total.sqrt())


def _gather(tensor: Tensor, mapped: Mapped, rank: int, size: int, ranks: Ranks) -> list[memoryview]:
    if size == 1 or mapped.split == "replicated":
        return [bytes_of(tensor)] if rank == 0 else []
    group = ranks.state.get_expert_tensor_parallel_group() if mapped.expert is not None else ranks.tp
    parts = [torch.empty_like(tensor) for _ in range(size)] if rank == 0 else None
    dist.gather(tensor.contiguous(), parts, group=group, group_dst=0)
    return [bytes_of(part) for part in parts or ()]


def bytes_of(tensor: Tensor) -> memoryview:
    """On a CPU the tensor's own memory. A view of numpy's would keep its storage from ever being freed for a while
    (`trainer.offload`)."""
    found = tensor.detach().cpu().contiguous()
    array = (ctypes.c_ubyte * found.nbytes).from_address(found.data_ptr())
    array.keeps_alive = found
    return memoryview(array).cast("B")
