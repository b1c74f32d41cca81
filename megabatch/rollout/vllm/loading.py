"""New weights for a model inside vLLM, by its layerwise reload.

A bare `model.load_weights` fails on CPUs and corrupts experts on GPUs, because vLLM has packed the tensors into the
form that its kernels want; the reload restores the loadable form layer by layer, and packs again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabatch.converters.dtypes import TORCH
from megabatch.rollout.bucket import Bucket, Part


class Pieces:
    """Puts the parts of tensors together that are larger than a bucket."""

    def __init__(self, *, copies: bool) -> None:
        """Args: copies: whether a bucket's data changes while its tensors are used."""
        self._copies = copies
        self._begun: dict[str, tuple[Tensor, int]] = {}
        """Tensors of which some came, and how many of their bytes."""

    def whole(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        """Names and tensors that are complete with this bucket."""
        data = torch.frombuffer(bucket.data, dtype=torch.uint8)
        return [found for part in bucket.parts if (found := self._whole(part, data)) is not None]

    def _whole(self, part: Part, data: Tensor) -> tuple[str, Tensor] | None:
        piece = data[part.offset : part.offset + part.size]
        dtype = getattr(torch, TORCH[part.dtype])
        size = torch.Size(part.shape).numel() * dtype.itemsize
        if part.size == size:
            return part.name, (piece.clone() if self._copies else piece).view(dtype).view(part.shape)
        buffer, came = self._begun.pop(part.name, (torch.empty(size, dtype=torch.uint8), 0))
        buffer[part.start : part.start + part.size] = piece
        if came + part.size < size:
            self._begun[part.name] = buffer, came + part.size
            return None
        return part.name, buffer.view(dtype).view(part.shape)


class Loading:
    """One update of a model of vLLM 0.32."""

    def __init__(self, model: Any, model_config: Any, vllm_config: Any, *, copies: bool = True) -> None:
        """Args: copies: whether a bucket's data changes before its layers are complete."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._model, self._model_config, self._vllm_config = model, model_config, vllm_config
        self._pieces = Pieces(copies=copies)
        if not torch.cuda.is_available():
            _forget_kernels(model)
        with set_current_vllm_config(vllm_config):
            initialize_layerwise_reload(model)

    def put(self, bucket: Bucket) -> None:
        """The reload keeps tensors until their layer is complete."""
        from vllm.config import set_current_vllm_config

        if whole := self._pieces.whole(bucket):
            with set_current_vllm_config(self._vllm_config):
                self._model.load_weights(whole)

    def end(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with set_current_vllm_config(self._vllm_config):
            finalize_layerwise_reload(self._model, self._model_config)
            if not torch.cuda.is_available():
                _pack_tied(self._model)


def _forget_kernels(model: Any) -> None:
    """On CPUs vLLM 0.32 does not pack experts again while it has a kernel of the old ones (logits off by 10)."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_tied(model: Any) -> None:
    """On CPUs a tied output layer keeps what vLLM 0.32 packed of the old embedding: nothing is loaded for it by name,
    and so it is not packed again."""
    first: dict[int, Any] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and first.setdefault(id(weight), module) is not module:
            module.quant_method.process_weights_after_loading(module)
