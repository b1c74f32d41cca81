"""Optimizer state by parameter: what a checkpoint holds, whatever the layout that wrote it.

megatron-core's own formats do not work for every model. In 0.16.1 `fully_reshardable` drops the tail of a buffer with
more than one bucket (it says "can lead to data corruption"), `dp_reshardable` refuses parameters whose size is not a
multiple of 64, and `fully_sharded_model_space` needs flattened ranges that were removed. Here the rank that writes a
parameter gathers its state over the data-parallel group; one exchange covers many parameters and sends every number
once. Parameters are dealt so that all ranks hold and write about the same amount. The keys are those of
megatron-core's `fully_reshardable`: `optimizer.state.{param,exp_avg,exp_avg_sq}.<parameter>`, and `momentum_buffer`
instead of the last two for what SGD or Muon updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megabatch.trainer.checkpoints.replicas import Dealer, group_of
from megabatch.trainer.matrices import model_parameters
from megabatch.trainer.optimizer import Optimizer
from megabatch.trainer.ranks import Ranks

BLOCK_BYTES = 2 << 30
"""How much state each rank reads from a checkpoint at a time."""
EXCHANGE_BYTES = 256 << 20
"""How much of one kind of state a data-parallel group exchanges at a time."""
_PREFIX = "optimizer.state."


@dataclass(frozen=True, slots=True)
class _State:
    """One parameter's optimizer state on this rank: a range of the flat parameter."""

    parameter: nn.Parameter
    start: int
    stop: int
    is_split: bool
    """Whether the ranks of the data-parallel group hold different ranges; the same on all of them."""
    names: tuple[str, ...]
    """What is kept: `param` (fp32 main copy) and the optimizer's own; the same on all of them."""
    tensors: Mapping[str, Tensor]
    """Flat views by name, fp32 or bf16; none for an empty range."""


_Placed = tuple[_State, dist.ProcessGroup]
"""A state and the data-parallel group of its parameter."""


def sharded(optimizer: Optimizer, model_state: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What this rank writes, as megatron-core's sharded tensors; collective over each data-parallel group."""
    optimizer.allocate_missing_state()
    optimizer.check_host_copies()
    described = _described(model_state)
    found: dict[str, Any] = {}
    by_group: dict[dist.ProcessGroup, list[_Dealt]] = {}
    dealers: dict[dist.ProcessGroup, Dealer] = {}
    for i, (state, group) in enumerate(_states(optimizer, ranks)):
        dealer = dealers.setdefault(group, Dealer(dist.get_world_size(group)))
        by_group.setdefault(group, []).append(_Dealt(i, state, dealer.writer(state.parameter.numel())))
    for group, dealt in by_group.items():
        for block in _exchanges(dealt, group):
            for name in block.dealt[0].state.names:
                for one, whole in block.wholes(name):
                    entry = _entry(described[one.state.parameter], name, whole, replica=0)
                    found[f"{one.number}.{name}"] = entry
    return found


def restore(optimizer: Optimizer, model_state: Mapping[str, Any], ranks: Ranks, load: Any, *, updates: int) -> None:
    """Loads this rank's ranges from a checkpoint, a block of parameters at a time.

    Args: load: takes a dict of sharded tensors and returns it with values; updates: number of updates done.
    """
    optimizer.allocate_state(updates)
    described = _described(model_state)
    for block in _blocks_everywhere(_states(optimizer, ranks)):
        wanted = {
            f"{i}.{name}": _entry(
                described[state.parameter],
                name,
                torch.empty(state.parameter.shape, dtype=torch.float32),
                replica=dist.get_rank(group),
            )
            for i, (state, group) in enumerate(block)
            for name in state.names
        }
        loaded = load(wanted)
        with torch.no_grad():
            for i, (state, _) in enumerate(block):
                for name in state.names:
                    if state.stop > state.start:
                        state.tensors[name].copy_(loaded[f"{i}.{name}"].reshape(-1)[state.start : state.stop])


def fault_of_kinds(optimizer: Optimizer, saved: Iterable[str]) -> str | None:
    """Why this optimizer cannot go on from a checkpoint that another one wrote; None where it can, or where the
    checkpoint has no optimizer. Args: saved: the checkpoint's keys."""
    has = {key.split(".")[2] for key in saved if key.startswith(_PREFIX)}
    known = {name for inner in optimizer.inner for name in optimizer.state_names(inner)}
    needed = {name for inner in optimizer.inner if inner.get_parameters() for name in optimizer.state_names(inner)}
    if not has or (needed <= has <= known):
        return None
    which, kinds = ("lacks", needed - has) if needed - has else ("has", has - known)
    return (
        f"optimizer.optimizer={optimizer.name!r} cannot go on from it: its optimizer was another one, whose state "
        f"{which} {' and '.join(sorted(kinds))}; set the optimizer of the run that saved it, or "
        "checkpoint.no_load_optim=True to begin with fresh state"
    )


def _blocks_everywhere(states: Iterator[_Placed]) -> list[list[_Placed]]:
    """Blocks of states, padded with empty ones to the same number on every rank, since every load is collective.

    A single rank reads everything in one block: megatron-core (0.16) assumes that other ranks read what it leaves out.
    """
    if dist.get_world_size() == 1:
        return [list(states)]
    blocks = list(_blocks(states))
    most = torch.tensor(len(blocks))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return blocks + [[] for _ in range(int(most) - len(blocks))]


def _described(model_state: Mapping[str, Any]) -> dict[Tensor, ShardedTensor | ShardedTensorFactory]:
    """The place of each parameter in its global tensor."""
    return {
        item.data: item
        for item in nested_values(dict(model_state))
        if isinstance(item, ShardedTensor | ShardedTensorFactory) and isinstance(item.data, nn.Parameter)
    }


def _entry(
    metadata: ShardedTensor | ShardedTensorFactory, name: str, data: Tensor, *, replica: int
) -> ShardedTensor | ShardedTensorFactory:
    *outer, _ = metadata.replica_id
    values: dict[str, Any] = {
        "key": f"{_PREFIX}{name}.{metadata.key}",
        "data": data,
        "replica_id": (*outer, replica),
    }
    if isinstance(metadata, ShardedTensor):
        values["dtype"] = data.dtype
    return replace(metadata, **values)


@dataclass(frozen=True, slots=True)
class _Dealt:
    """A parameter's state and the rank of its data-parallel group that writes it."""

    number: int
    state: _State
    writer: int


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Parameters with the same kinds of state, which is gathered in one exchange."""

    dealt: Sequence[_Dealt]
    ranges: Tensor
    """[ranks of the group, parameters, 2]: the range of the flat parameter that each rank holds."""
    group: dist.ProcessGroup

    def wholes(self, name: str) -> Iterator[tuple[_Dealt, Tensor]]:
        """The states that this rank writes, in their parameters' shapes and in host memory; collective."""
        size, mine = dist.get_world_size(self.group), dist.get_rank(self.group)
        if size == 1 or not self.dealt[0].state.is_split:
            for one in self.dealt:
                if one.writer == mine:
                    yield one, one.state.tensors[name].float().view(one.state.parameter.shape).cpu()
            return
        sent = [self._sent(name, writer) for writer in range(size)]
        own = [i for i, one in enumerate(self.dealt) if one.writer == mine]
        lengths = self.ranges[:, :, 1] - self.ranges[:, :, 0]
        expected = [int(lengths[rank, own].sum()) for rank in range(size)]
        device = self.dealt[0].state.parameter.device
        received = torch.empty(sum(expected), dtype=torch.float32, device=device)
        dist.all_to_all_single(received, torch.cat(sent), expected, [len(part) for part in sent], group=self.group)
        parts = list(received.cpu().split(expected))
        for i in own:
            parameter = self.dealt[i].state.parameter
            whole = torch.empty(parameter.numel(), dtype=torch.float32)
            for rank in range(size):
                start, stop = self.ranges[rank, i].tolist()
                whole[start:stop] = parts[rank][: stop - start]
                parts[rank] = parts[rank][stop - start :]
            yield self.dealt[i], whole.view(parameter.shape)

    def _sent(self, name: str, writer: int) -> Tensor:
        """This rank's ranges of the parameters that `writer` writes, in order."""
        ours = [one.state for one in self.dealt if one.writer == writer]
        device = self.dealt[0].state.parameter.device
        none = torch.empty(0, dtype=torch.float32, device=device)
        return torch.cat([none, *(s.tensors[name].to(device, torch.float32) for s in ours if s.stop > s.start)])


def _exchanges(dealt: Sequence[_Dealt], group: dist.ProcessGroup) -> Iterator[_Exchange]:
    """Blocks of parameters that are either all split or all not, with the same state, with every rank's ranges."""
    ranges = _everyones_ranges(dealt, group)
    start, size = 0, 0
    for i, one in enumerate(dealt):
        if i > start and (size > EXCHANGE_BYTES or _kind(one) != _kind(dealt[start])):
            yield _Exchange(dealt[start:i], ranges[:, start:i], group)
            start, size = i, 0
        size += one.state.parameter.numel() * 4
    if dealt:
        yield _Exchange(dealt[start:], ranges[:, start:], group)


def _kind(one: _Dealt) -> tuple[bool, tuple[str, ...]]:
    return one.state.is_split, one.state.names


def _everyones_ranges(dealt: Sequence[_Dealt], group: dist.ProcessGroup) -> Tensor:
    mine = torch.tensor([[one.state.start, one.state.stop] for one in dealt], dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone)


def _states(optimizer: Optimizer, ranks: Ranks) -> Iterator[_Placed]:
    """Each parameter's state with its data-parallel group, in the same order on all ranks of that group."""
    for inner in optimizer.inner:
        names = optimizer.state_names(inner)
        find = _distributed(inner, names) if isinstance(inner, DistributedOptimizer) else _plain(inner, names)
        for state in find:
            yield state, group_of(state.parameter, ranks)


def _distributed(inner: DistributedOptimizer, names: tuple[str, ...]) -> Iterator[_State]:
    ranges = {
        parameter: place["param"]
        for buffer in inner.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for parameter, place in bucket["param_map"].items()
    }
    for buffer in inner.buffers:
        for parameter in buffer.param_index_map:
            if parameter not in ranges:
                yield _State(parameter, 0, 0, True, names, {})
                continue
            tensors = _own_state(inner, parameter)
            yield _State(parameter, ranges[parameter].start, ranges[parameter].end, True, names, _flat(tensors))


def _own_state(inner: DistributedOptimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    """The tensors in which an optimizer keeps a parameter's state. Those of the precision-aware one are fp32 or bf16,
    which fp32 holds exactly (megatron-core would return copies); those of `HostAdam` may be in host memory."""
    if not inner.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return inner._get_main_param_and_optimizer_states(parameter)
    group, order = inner.model_param_group_index_map[parameter]
    state = inner.optimizer.state[inner.optimizer.param_groups[group]["params"][order]]
    return {"param": state["master_param"], "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def _plain(inner: Any, names: tuple[str, ...]) -> Iterator[_State]:
    """The states of an optimizer that holds all of them on every rank."""
    of_the_model = model_parameters(inner)
    for group in [] if inner.optimizer is None else inner.optimizer.param_groups:
        for main in group["params"]:
            tensors = {"param": main, **inner.optimizer.state[main]}
            parameter = of_the_model.get(main, main)
            yield _State(parameter, 0, parameter.numel(), False, names, _flat(tensors))


def _flat(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().view(-1) for name, tensor in tensors.items() if name != "step"}


def _blocks(
    states: Iterator[_Placed],
) -> Iterator[list[_Placed]]:
    block: list[_Placed] = []
    size = 0
    for state, group in states:
        block.append((state, group))
        size += state.parameter.numel() * 4 * 3
        if size > BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
