"""What runs in the process of a vLLM server that answers requests.

vLLM imports this module by `--middleware`, before it reads who can find adapters; its import registers that the
trainer's adapter is found by its name, without a folder. For vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from megabatch.rollout.vllm.adapter import NAME, request
from megabatch.rollout.vllm.guard import Guard

__all__ = ["Guard"]


class Given(LoRAResolver):
    """Of an adapter that the workers have already (`worker.Extension.megabatch_use_adapter`)."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        return request() if lora_name == NAME else None


LoRAResolverRegistry.register_resolver("megabatch", Given())
