"""Prompts scored at their request's temperature, as vLLM's second model runner computes them: rows in parts."""

from __future__ import annotations

import torch

from megabatch.rollout.vllm.tempering import row_by_row


def test_each_row_has_its_requests_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_TH, head_HV = torch.randn(9, 4, generator=generator), torch.randn(4, 7, generator=generator)
    temperatures, lengths = (0.5, 1.0, 2.0), (2, 3, 4)
    divided = row_by_row(lambda part: part @ head_HV, torch.tensor(temperatures), torch.tensor(lengths))
    found_TV = torch.cat([divided(part) for part in hidden_TH.split(4)])
    expected_TV = torch.cat(
        [
            part @ head_HV / temperature
            for part, temperature in zip(hidden_TH.split(lengths), temperatures, strict=True)
        ]
    )
    torch.testing.assert_close(found_TV, expected_TV)
    assert found_TV.dtype == torch.float32


def test_rows_at_temperature_1_stay_as_they_are() -> None:
    def logits_of(part: torch.Tensor) -> torch.Tensor:
        return part

    assert row_by_row(logits_of, torch.ones(3), torch.tensor([1, 2, 3])) is logits_of
