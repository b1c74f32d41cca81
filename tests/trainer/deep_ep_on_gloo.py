"""DeepEP's interface (`deep_ep.Buffer` of version 1, as megatron-core 0.16.1 calls it), exchanged over gloo.

DeepEP needs GPUs with NVLink. Here its place is taken by what its documentation says of each call, so that all of
megatron-core's flex dispatch runs on CPUs; DeepEP's own kernels are for tests/gpu.

T tokens of this rank, R received, K chosen experts, P ranks, H hidden.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Event:
    def __init__(self, event: Any = None) -> None: ...

    def current_stream_wait(self) -> None: ...


class Buffer:
    num_sms = 20
    calls: tuple[int, int] = (0, 0)
    """Tokens that this rank sent to experts, and chosen experts without a token: padding."""

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        assert num_ranks in (2, 4, 8)
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: hidden_bytes * ranks,
            get_rdma_buffer_size_hint=lambda hidden_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> Any:
        """int64 [T, K], -1 for none. Returns also, bool [T, P], whether a token goes to a rank."""
        assert topk_idx.dtype == torch.int64
        each = num_experts // self.group.size()
        owner_TK = torch.where(topk_idx < 0, -1, topk_idx // each)
        goes_TP = torch.stack([(owner_TK == rank).any(-1) for rank in range(self.group.size())], dim=-1)
        sent, none = Buffer.calls
        Buffer.calls = (sent + int((topk_idx >= 0).sum()), none + int((topk_idx < 0).sum()))
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return goes_TP.sum(0), None, per_expert, goes_TP, Event()

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """[T, H] → received tokens [R, H], each once, with the numbers of this rank's experts (-1 for others)."""
        if handle is not None:
            return self._there(x, handle), None, None, None, None, Event()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None and topk_weights.dtype == torch.float32
        tokens = [one.nonzero()[:, 0] for one in is_token_in_rank.unbind(-1)]
        counts = torch.tensor([len(one) for one in tokens])
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        handle = (torch.cat(tokens), counts.tolist(), arriving.tolist(), len(x))
        idx_RK, weights_RK = self._there(topk_idx, handle), self._there(topk_weights, handle)
        each = len(num_tokens_per_expert) // self.group.size()
        local_RK = idx_RK - dist.get_rank(self.group) * each
        mine_RK = (idx_RK >= 0) & (local_RK >= 0) & (local_RK < each)
        local_RK = local_RK.masked_fill(~mine_RK, -1)
        received = torch.bincount(local_RK[mine_RK], minlength=each).tolist()
        return self._there(x, handle), local_RK, weights_RK * mine_RK, received, handle, Event()

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, **_: Any) -> Any:
        """[R, H] → for each token [T, H] the sum of what its ranks send back; likewise weights [R, K] → [T, K]."""
        weights = None if topk_weights is None else self._back(topk_weights, handle)
        return self._back(x, handle), weights, Event()

    def _there(self, rows: Tensor, handle: Any) -> Tensor:
        tokens, counts, arriving, _ = handle
        out = rows.new_empty((sum(arriving), *rows.shape[1:]))
        dist.all_to_all_single(out, rows[tokens].contiguous(), arriving, counts, group=self.group)
        return out

    def _back(self, rows: Tensor, handle: Any) -> Tensor:
        tokens, counts, arriving, length = handle
        out = rows.new_empty((len(tokens), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), counts, arriving, group=self.group)
        return rows.new_zeros((length, *rows.shape[1:])).index_add_(0, tokens, out)


def install() -> None:
    """As if the package were there, for a megatron-core that may be loaded already."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    for module in (package, utils):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    package.Buffer = Buffer  # type: ignore[attr-defined]
    utils.EventHandle = utils.EventOverlap = Event  # type: ignore[attr-defined]
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    importlib.reload(fused_a2a)
    for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms"):
        setattr(token_dispatcher, name, getattr(fused_a2a, name))
