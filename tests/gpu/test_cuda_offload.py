"""A model in page-locked host memory between its passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megabatch.trainer.offload import Offload, tensors_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("constant", [True, False])
def test_the_device_has_the_memory_while_weights_are_away(constant: bool) -> None:
    layer = nn.Linear(4096, 4096, device="cuda").requires_grad_(False)
    inputs = torch.randn(8, 4096, device="cuda")
    expected, full = layer(inputs), torch.cuda.memory_allocated()
    offload = Offload(tensors_of([layer]), values="constant" if constant else "changing")
    for _ in range(3):
        offload.to_host()
        assert torch.cuda.memory_allocated() <= full - offload.bytes
        with offload.on_device():
            assert torch.equal(layer(inputs), expected)
    assert offload.is_away
