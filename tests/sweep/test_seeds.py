"""Confidence intervals of means over seeds against printed tables of Student's distribution."""

from __future__ import annotations

import pytest

from megabatch.sweep.seeds import half_width, quantile


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_printed_tables(freedom: int, expected: float) -> None:
    assert quantile(freedom) == pytest.approx(expected, abs=5e-4)


def test_one_value_has_no_interval_and_equal_ones_have_none_to_speak_of() -> None:
    assert half_width([1.0]) is None
    assert half_width([0.5, 0.5, 0.5]) == 0.0
