from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megabatch.trainer.model.norms import RMSNorm


def _norm(width: int) -> RMSNorm:
    config: Any = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
    norm = RMSNorm(config, width, eps=1e-6)
    norm.weight.data = torch.randn(width, generator=torch.Generator().manual_seed(1))
    return norm


@pytest.mark.parametrize("shape", [(7, 1, 16), (7, 1, 3, 8), (1, 1, 4)])
def test_value_and_gradients_equal_the_formula_in_fp64(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = _norm(shape[-1])
    x = torch.randn(shape, generator=generator).requires_grad_()
    grad = torch.randn(shape, generator=generator)
    out = norm(x)
    out.backward(grad)
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    expected.backward(grad.double())
    for found, reference in ((out, expected), (x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert found is not None
        assert reference is not None
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_the_others() -> None:
    norm = _norm(32)
    x = torch.randn(65, 1, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat([norm(part) for part in x.split(9)]), norm(x))


def test_strided_input_gives_the_same() -> None:
    """Queries and keys are slices of one tensor."""
    norm = _norm(8)
    x = torch.randn(5, 1, 3, 24, generator=torch.Generator().manual_seed(3))[..., 8:16].requires_grad_()
    copy = x.detach().clone().contiguous().requires_grad_()
    for each in (x, copy):
        each.retain_grad()
        norm(each).square().sum().backward()
    assert torch.equal(norm(x), norm(copy))
    torch.testing.assert_close(x.grad, copy.grad, rtol=1e-6, atol=1e-6)
