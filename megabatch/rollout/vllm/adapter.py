"""An adapter for a model inside vLLM, from tensors in memory; vLLM itself reads adapters from folders alone.

For vLLM 0.32. The adapter replaces the one before it in the same place, and requests name it by `request()`, those to
a server by `NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket
from megabatch.rollout.engine import Adapter
from megabatch.rollout.vllm.loading import Pieces

NAME = "policy-adapter"
_NUMBER = 1


def request() -> Any:
    """What vLLM's requests name the adapter by. It has no folder, and is never looked for in one."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, _NUMBER, "given by the trainer")


def use(worker: Any, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Puts an adapter in place. Args: tensors: A and B by their names in PEFT's folder.

    Raises: RolloutError naming what vLLM has no place for; it would leave that out without a word.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager._adapter_manager
    helper = PEFTHelper(r=adapter.rank, lora_alpha=adapter.scale * adapter.rank, target_modules=[])
    made = LoRAModel.from_lora_tensors(
        _NUMBER, dict(tensors), helper, device="cpu", dtype=worker.vllm_config.lora_config.lora_dtype
    )
    if strange := sorted(set(made.loras) - _layers(manager)):
        raise RolloutError(f"vLLM cannot adapt {len(strange)} layers: {', '.join(strange[:5])}")
    manager.remove_adapter(_NUMBER)
    manager.add_adapter(made)
    manager.activate_adapter(_NUMBER)


class Taking:
    """One update of the adapter."""

    def __init__(self, worker: Any, adapter: Adapter) -> None:
        self._worker, self._adapter = worker, adapter
        self._pieces = Pieces(copies=True)
        self._tensors: dict[str, Tensor] = {}

    def put(self, bucket: Bucket) -> None:
        self._tensors |= self._pieces.whole(bucket)

    def end(self) -> None:
        """Raises: RolloutError, as `use`."""
        use(self._worker, self._adapter, self._tensors)


def _layers(manager: Any) -> set[str]:
    """Names of the layers that can be adapted, as Hugging Face has them: parts of fused ones apart."""
    found: set[str] = set()
    for name in manager.modules:
        stem, _, leaf = name.rpartition(".")
        found |= {f"{stem}.{part}" for part in manager.packed_modules_mapping.get(leaf, [leaf])}
    return found
