"""Block-scaled FP8 made of floats, against torch's own rounding, block by block."""

from __future__ import annotations

import pytest
import torch
from fp8_reference import by_torch

from megabatch.converters.engine.block_quantise import BlockQuantiser
from megabatch.converters.engine.compute import Computer
from megabatch.converters.engine.plan import Blocks
from megabatch.errors import ConversionError

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def ours(values: torch.Tensor, height: int, width: int, *, powers: bool = False) -> tuple[torch.Tensor, ...]:
    rows, columns = values.shape
    raw = memoryview(values.contiguous().view(torch.uint8).numpy().tobytes())
    quantiser, found = BlockQuantiser(Computer()), []
    for makes, shape, size in (
        ("weights", values.shape, 1),
        ("scales", (-(-rows // height), -(-columns // width)), 4),
    ):
        made = bytearray(shape[0] * shape[1] * size)
        blocks = Blocks(height, width, powers, rows, columns, makes)  # type: ignore[arg-type]
        getattr(quantiser, makes)(raw, NAMES[values.dtype], blocks, out=memoryview(made))
        found.append(torch.frombuffer(made, dtype=torch.uint8 if size == 1 else torch.float32).view(shape))
    return tuple(found)


def check(values: torch.Tensor, *, height: int = 128, width: int = 128, powers: bool = False) -> None:
    expected, found = by_torch(values, height, width, powers=powers), ours(values, height, width, powers=powers)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0].view(torch.uint8))


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("shape", [(128, 128), (300, 515), (1, 1), (129, 40), (2, 140_000)])
def test_random_weights(shape: tuple[int, int], dtype: torch.dtype, powers: bool) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    spread = torch.exp2(torch.randint(-14, 3, shape, generator=generator).float())
    check((torch.randn(shape, generator=generator) * spread).to(dtype), powers=powers)


def test_every_fp8_number_and_every_tie_between_two_of_them() -> None:
    """Blocks whose largest number is 448, so that the scale is one."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([torch.nextafter(ties, torch.tensor(side)) for side in (0.0, 1e9)])
    values = torch.cat([numbers, ties, near])
    values = torch.cat([values, -values, torch.tensor([448.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38])])
    assert values.numel() % 4 == 0
    check(values.view(4, -1), height=4, width=values.numel() // 4)


def test_zeros_and_the_smallest_numbers() -> None:
    values = torch.zeros(4, 40)
    values[0, 3], values[1, 9], values[2, 0] = -0.0, 1e-45, -3e-43
    values[3, 30], values[3, 31] = 2.0**-120, 2.0**-126
    check(values, height=2, width=8)
    check(values, height=2, width=8, powers=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    values = torch.ones(300, 300)
    values[290, 5] = value
    with pytest.raises(ConversionError, match="infinities or NaN"):
        ours(values, 128, 128)
