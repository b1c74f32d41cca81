"""The last part of a backward pass: what megatron-core does, and the sums that experts' adapters need besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import nn

from megabatch.trainer.model.lora.adapter import SUMMED


def finalize(model: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
    """Runs megatron-core's `finalize_model_grads`, then sums over expert tensor parallelism the gradient of each
    expert adapter's matrix that all of these ranks have: each rank computed it from its own part of the layer."""
    finalize_model_grads(model, *args, **kwargs)
    parameters = [p for chunk in model for p in chunk.parameters() if p.requires_grad and getattr(p, SUMMED, False)]
    if not parameters:
        return
    grads = [parameter.main_grad for parameter in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat, group=parallel_state.get_expert_tensor_parallel_group())
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))
