"""What runs inside the workers of a vLLM server: they take weights that a trainer broadcasts.

vLLM imports this module by `--worker-extension-cls`; its import registers the backend `megabatch` of vLLM's weight
transfer, and has prompts scored at their request's temperature (`tempering`). For vLLM 0.32, which checks nothing
here: the trainer compares log-probabilities after each update.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megabatch.rollout.bucket import Bucket
from megabatch.rollout.engine import Adapter
from megabatch.rollout.vllm.adapter import use
from megabatch.rollout.vllm.group import Group, join
from megabatch.rollout.vllm.loading import Loading, Pieces
from megabatch.rollout.vllm.stream import Buffers, arriving
from megabatch.rollout.vllm.tempering import patch

BACKEND = "megabatch"


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the group meets; sent as JSON."""

    address: str
    port: int
    size: int
    timeout_s: float


@dataclass
class Sent(WeightTransferUpdateInfo):
    """All buckets of an update, which come by the group."""

    is_adapter: bool = False
    """Whether they have an adapter's tensors, which are kept for `Extension.megabatch_use_adapter`."""


class _Tensors:
    """What came of an adapter."""

    def __init__(self) -> None:
        self._pieces = Pieces(copies=False)
        self.tensors: dict[str, Tensor] = {}

    def put(self, bucket: Bucket) -> None:
        self.tensors |= self._pieces.whole(bucket)


class Transfer(WeightTransferEngine):
    """vLLM's calls during an update, in each worker."""

    init_info_cls = Meeting
    update_info_cls = Sent
    _group: Group | None = None
    _loading: Loading | None = None
    _adapter: _Tensors | None = None

    def init_transfer_engine(self, init_info: Meeting) -> None:
        own = self.parallel_config
        rank = 1 + own.data_parallel_index * own.world_size + own.rank
        self._group = join(
            init_info.address,
            init_info.port,
            rank=rank,
            size=init_info.size,
            device=torch.device(self.device),
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        self._loading, self._adapter = None, None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Sent) -> None:
        """A failure closes the group, by which the trainer learns of it when it sends the next bucket."""
        assert self._group is not None, "init comes before"
        taking: _Tensors | Loading
        if update_info.is_adapter:
            taking = self._adapter = _Tensors()
        else:
            taking = self._loading = Loading(self.model, self.model_config, self.vllm_config, copies=False)
        try:
            with closing(arriving(self._group, Buffers())) as buckets:
                for bucket in buckets:
                    taking.put(bucket)
        except BaseException:
            self._group.close()
            self._group = None
            raise

    def finish_weight_update(self) -> None:
        loading, self._loading = self._loading, None
        if loading is not None:
            loading.end()

    def take_adapter(self) -> dict[str, Tensor]:
        """The tensors of the adapter that came, once."""
        came, self._adapter = self._adapter, None
        return {} if came is None else came.tensors

    def shutdown(self) -> None:
        self._group = None


class Extension:
    """More methods of vLLM's worker, for `/collective_rpc`."""

    def megabatch_facts(self) -> dict[str, Any]:
        """What a trainer compares with its own model before it sends weights."""
        model = self.model_runner.model_config  # type: ignore[attr-defined]
        text = model.hf_text_config
        names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
        lora = self.vllm_config.lora_config  # type: ignore[attr-defined]
        return {
            **{name: getattr(text, name, None) for name in names},
            "dtype": str(model.dtype).removeprefix("torch."),
            "lora_rank": None if lora is None else lora.max_lora_rank,
            "lora_layers": None if lora is None else sorted(lora.target_modules or ()),
        }

    def megabatch_use_adapter(self, rank: int, scale: float) -> None:
        """Computes with the adapter of the last update. A call of its own: vLLM forgets all adapters as it ends an
        update."""
        transfer = self.weight_transfer_engine  # type: ignore[attr-defined]
        use(self, Adapter(rank=rank, scale=scale), transfer.take_adapter())


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, Transfer)
patch()
