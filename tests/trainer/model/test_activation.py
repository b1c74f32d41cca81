"""SwiGLU of dense layers on CPUs against its formula, bit for bit."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from megabatch.trainer.model.activation import swiglu


def test_value_and_gradient_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 14, generator=generator).requires_grad_()
    copy = x.detach().clone().requires_grad_()
    weights = torch.randn(5, 1, 7, generator=generator)
    gate, up = copy.chunk(2, dim=-1)
    expected = silu(gate) * (up + 0.0)
    (expected * weights).sum().backward()
    found = swiglu(x)
    (found * weights).sum().backward()
    assert torch.equal(found, expected) and x.grad is not None and torch.equal(x.grad, copy.grad)
