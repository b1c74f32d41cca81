"""Process groups: one rank of a run joins the others and takes its place in the layout."""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from megabatch.errors import ElsewhereError, LaunchError, MegabatchError
from megabatch.plan.layout import Layout
from megabatch.trainer.megatron_cpu import adapt, adapt_router
from megabatch.trainer.process_groups import Groups
from megabatch.trainer.waiting import Waiting

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This process's place among the run's processes, from the environment that its launcher sets."""

    rank: int
    world_size: int
    local_rank: int
    attempt: int
    """Number of this attempt of the run, from 0."""

    @staticmethod
    def from_environment() -> Place:
        try:
            return Place(
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                local_rank=int(os.environ["LOCAL_RANK"]),
                attempt=int(os.environ.get("MEGABATCH_ATTEMPT", "0")),
            )
        except KeyError as e:
            raise LaunchError(
                f"{e.args[0]} is not set: start ranks with a recipe (--submit or --local), not by hand"
            ) from e


class Ranks:
    """The process groups of one layout; use as a context manager.

    Args are megatron-core's sizes. With GPUs, the backend is nccl for device tensors and gloo for host tensors;
    without GPUs it is gloo.
    """

    def __init__(
        self,
        *,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: int | None = None,
        context_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        expert_tensor_parallel_size: int = 1,
        distributed_timeout_minutes: int = 10,
        seed: int = 42,
        gpus_per_node: int = 0,
    ) -> None:
        self.place = Place.from_environment()
        self.device = _device(self.place.local_rank, gpus_per_node)
        self.virtual_size = virtual_pipeline_model_parallel_size
        self._owns_world = not dist.is_initialized()
        if self._owns_world:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                rank=self.place.rank,
                world_size=self.place.world_size,
                timeout=timedelta(minutes=distributed_timeout_minutes),
            )
        self.state = Groups(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
            context_parallel_size=context_parallel_size,
            expert_model_parallel_size=expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tensor_parallel_size,
            create_gloo_process_groups=True,
        )
        self._others: list[Ranks] = []
        self._waiting = Waiting(self.place.rank, self.place.world_size) if self.place.world_size > 1 else None
        self.seed(seed)

    def beside(self, layout: Layout) -> Ranks:
        """The same ranks in another layout, for a model without gradients; collective. It ends with this one.

        megatron-core sees its groups inside `in_use`.
        """
        other = copy.copy(self)
        other.virtual_size, other._owns_world, other._others = None, False, []
        other.state = Groups(
            beside=self.state,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
        self._others.append(other)
        if self.device.type == "cuda":
            self.barrier()  # makes NCCL's communicator of the world, before only some ranks send through it
        return other

    def in_use(self) -> AbstractContextManager[None]:
        """Inside this context megatron-core builds and runs models of this layout."""
        return self.state.in_use()

    def seed(self, seed: int, *, step: int = 0) -> None:
        """Starts the random generators over, as functions of the seed, the steps done and the rank's place: one seed
        for each pipeline stage; tensor-parallel regions have their own generators."""
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        if step:
            seed = int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=4).digest(), "little")
        staged = seed + 100 * self.pp_rank
        random.seed(staged)
        np.random.seed(staged % 2**32)
        torch.manual_seed(staged)
        model_parallel_cuda_manual_seed(staged, force_reset_rng=True)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for ranks in (*self._others, self):
            ranks.state.destroy_model_parallel()
        if self._owns_world and kind is None:
            dist.destroy_process_group()

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes what the run writes once."""
        return self.place.rank == 0

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.state.get_tensor_model_parallel_group()

    @property
    def tp_rank(self) -> int:
        return int(self.state.get_tensor_model_parallel_rank())

    @property
    def tp_size(self) -> int:
        return int(self.state.get_tensor_model_parallel_world_size())

    @property
    def pp_rank(self) -> int:
        return int(self.state.get_pipeline_model_parallel_rank())

    @property
    def pp_size(self) -> int:
        return int(self.state.get_pipeline_model_parallel_world_size())

    @property
    def cp(self) -> dist.ProcessGroup:
        """Context-parallel ranks: they split each row."""
        return self.state.get_context_parallel_group()

    @property
    def cp_size(self) -> int:
        return int(self.state.get_context_parallel_world_size())

    @property
    def dp(self) -> dist.ProcessGroup:
        """Data-parallel ranks: they split the global batch's samples."""
        return self.state.get_data_parallel_group()

    @property
    def dp_rank(self) -> int:
        return int(self.state.get_data_parallel_rank())

    @property
    def dp_size(self) -> int:
        return int(self.state.get_data_parallel_world_size())

    @property
    def ep_rank(self) -> int:
        return int(self.state.get_expert_model_parallel_rank())

    @property
    def ep_size(self) -> int:
        return int(self.state.get_expert_model_parallel_world_size())

    @property
    def etp_rank(self) -> int:
        return int(self.state.get_expert_tensor_parallel_rank())

    @property
    def etp_size(self) -> int:
        return int(self.state.get_expert_tensor_parallel_world_size())

    @property
    def replicas(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of the model and see other samples, or other parts of the same samples."""
        return self.state.get_data_parallel_group(with_context_parallel=True)

    @property
    def model(self) -> dist.ProcessGroup:
        """Ranks that split one model and see the same samples: tensor and pipeline parallel."""
        return self.state.get_model_parallel_group()

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def barrier(self) -> None:
        dist.barrier()

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs a function on the main rank and returns its result, or raises its error, on all ranks.

        They wait for it however long it takes.
        """
        outcome: list[tuple[T | None, MegabatchError | None]] = [(None, None)]
        if self.is_main:
            try:
                outcome = [(function(), None)]
            except MegabatchError as e:
                outcome = [(None, e)]
        if self._waiting is not None:
            self._waiting.for_main()
        dist.broadcast_object_list(outcome, src=0)
        value, error = outcome[0]
        if error is not None:
            raise error if self.is_main else ElsewhereError(error)
        return cast(T, value)

    def each(self, action: Callable[[], T]) -> T:
        """What an action of this rank returns, once every rank has done its own, however long that takes. Raises on
        every rank if one fails, as `raise_together`.

        Inside, ranks may wait for each other in collectives of other libraries: when one fails, those that stay in
        them are ended, with its error as their last words.
        """
        value, error = None, None
        with nullcontext() if self._waiting is None else self._waiting.ended_together() as say:
            try:
                value = action()
            except MegabatchError as e:
                error = e
                if say is not None:
                    say(e)
            if self._waiting is not None:
                self._waiting.for_all(stays=error is None)
        self.raise_together(error)
        return cast(T, value)

    def raise_together(self, error: MegabatchError | None) -> None:
        """Raises on every rank if any rank has an error: the error itself where it happened, else `ElsewhereError`."""
        errors: list[MegabatchError | None] = [None] * self.place.world_size
        try:
            dist.all_gather_object(errors, error)
        except RuntimeError:  # a rank is gone, maybe because of this error
            if error is None:
                raise
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                raise ElsewhereError(other, rank)

    def gather_on_main(self, value: T) -> list[T] | None:
        """Every rank's value in rank order on the main rank, None elsewhere."""
        values: list[T] | None = [value] * self.place.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on every rank."""
        value = torch.tensor([1 if flag else 0], dtype=torch.int64)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())


def _device(local_rank: int, gpus_per_node: int) -> torch.device:
    if gpus_per_node:
        seen = torch.cuda.device_count()
        if local_rank >= seen:
            raise LaunchError(
                f"local rank {local_rank} needs its own GPU but sees {seen}; check CUDA_VISIBLE_DEVICES and "
                f"resources.gpus_per_node={gpus_per_node}, or set gpus_per_node=0 and distributed_backend=gloo for a "
                "run on CPUs"
            )
        torch.cuda.set_device(local_rank)
        adapt_router()
        return torch.device("cuda", local_rank)
    adapt()
    return torch.device("cpu")
