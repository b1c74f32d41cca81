"""Tensors that leave their device and come back, and what shares their storage with them."""

from __future__ import annotations

import torch
from torch import nn

from megabatch.trainer.offload import Offload, tensors_of


def tied() -> nn.Module:
    module = nn.Module()
    module.embedding, module.output = nn.Embedding(7, 4), nn.Linear(4, 7, bias=True)
    module.output.weight = module.embedding.weight
    module.register_buffer("frequencies", torch.arange(3.0))
    return module


def test_weights_come_back_and_stay_tied() -> None:
    module = tied()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    offload = Offload(tensors_of([module]))
    assert offload.bytes == 4 * (7 * 4 + 7 + 3)
    for _ in range(2):
        offload.to_host()
        offload.to_host()
        assert offload.is_away
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors_of([module]))
        offload.to_device()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        with torch.no_grad():
            module.embedding.weight.add_(1)
        assert torch.equal(module.output.weight, module.embedding.weight)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_values_that_nobody_needs_come_back_as_zeros() -> None:
    buffer = torch.ones(4)
    offload = Offload([buffer[2:]], values="dropped")
    offload.to_host()
    assert buffer.untyped_storage().nbytes() == 0
    offload.to_device()
    assert torch.equal(buffer, torch.zeros(4))


def test_views_of_one_buffer_travel_once() -> None:
    buffer = torch.arange(12.0)
    first, second = buffer[:8].view(2, 4), buffer[8:]
    offload = Offload([first, second, buffer])
    assert offload.bytes == 48
    offload.to_host()
    offload.to_device()
    buffer[8] = -1
    assert second[0] == -1 and torch.equal(first, torch.arange(8.0).view(2, 4))


def test_a_context_leaves_them_where_they_were() -> None:
    weight = torch.ones(3)
    offload = Offload([weight], values="constant")
    with offload.on_device():
        assert weight.sum() == 3
    assert not offload.is_away
    offload.to_host()
    with offload.on_device():
        assert weight.sum() == 3
    assert offload.is_away
