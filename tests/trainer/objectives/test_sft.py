"""The loss of one row, by hand: plain, dynamic, and for each channel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megabatch.data.tokens.sample import Sample
from megabatch.errors import DataError
from megabatch.trainer.objectives.sft import Sft
from megabatch.trainer.pack import collate
from megabatch.trainer.tasks.sft import checked_channels


def sample(weights: list[float], channel: int) -> Sample:
    ids = np.arange(len(weights), dtype=np.int32)
    return Sample(ids, np.array(weights, np.float32), {"channel": channel})


PACK = collate([sample([0, 1, 2], 1), sample([0, 0.5], 0), sample([0, 1], 1)], row_multiple=8)
"""Predictions at 0 and 1 of weights 1 and 2, at 3 of 0.5, at 5 of 1; position 7 is padding."""
P = [0.5, 0.25, 0.9, 0.1, 0.9, 0.8, 0.9, 0.9]


def logps() -> torch.Tensor:
    return torch.tensor(P).log().requires_grad_()


def test_the_plain_loss() -> None:
    found = Sft().terms({"logps": logps()}, PACK)
    expected = -(math.log(0.5) + 2 * math.log(0.25) + 0.5 * math.log(0.1) + math.log(0.8))
    assert found.numerator.item() == pytest.approx(expected)
    assert found.weight.item() == 4.5
    assert found.metrics.keys() == {"loss"} == set(Sft().metrics)


def test_dynamic_fine_tuning_weighs_each_token_by_its_own_probability() -> None:
    plain, dynamic = logps(), logps()
    Sft().terms({"logps": plain}, PACK).numerator.backward()
    objective = Sft(dynamic=True)
    found = objective.terms({"logps": dynamic}, PACK)
    found.numerator.backward()
    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25) + 0.5 * 0.1 * math.log(0.1) + 0.8 * math.log(0.8))
    assert found.numerator.item() == pytest.approx(expected)
    assert found.weight.item() == 4.5, "the mean is over the data's weights"
    assert plain.grad is not None and dynamic.grad is not None
    torch.testing.assert_close(dynamic.grad, plain.grad * torch.tensor(P))
    nll = -(math.log(0.5) + 2 * math.log(0.25) + 0.5 * math.log(0.1) + math.log(0.8))
    assert found.metrics["nll"].total.item() == pytest.approx(nll)
    assert tuple(found.metrics) == objective.metrics == ("loss", "nll")


@pytest.mark.parametrize("dynamic", [False, True])
def test_channels_add_up_to_the_loss(dynamic: bool) -> None:
    objective = Sft(dynamic=dynamic, channels=("code", "math", "none here"))
    found = objective.terms({"logps": logps()}, PACK)
    assert tuple(found.metrics) == objective.metrics
    totals = {name: (mean.total.item(), mean.count.item()) for name, mean in found.metrics.items()}
    factor = 0.1 if dynamic else 1.0
    assert totals["loss_code"] == (pytest.approx(-0.5 * factor * math.log(0.1)), 0.5)
    assert totals["loss_math"][1] == 4
    assert totals["loss_none here"] == (0, 0)
    assert sum(totals[f"loss_{name}"][0] for name in ("code", "math")) == pytest.approx(totals["loss"][0])


def test_a_row_without_samples_has_every_metric() -> None:
    blank = Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), {"channel": 0})
    objective = Sft(channels=("code", "math"))
    found = objective.terms({"logps": torch.zeros(8)}, collate([], blank=blank, row_multiple=8))
    assert [(mean.total.item(), mean.count.item()) for mean in found.metrics.values()] == [(0, 0)] * 3


def test_channels_have_curves_of_their_own_names() -> None:
    assert checked_channels(["code", "math_sum"]) == ["code", "math_sum"]
    for channels in (["sum"], ["math", "math_count"]):
        with pytest.raises(DataError, match=rf"the channel '{channels[-1]}' .*give it another name"):
            checked_channels(channels)
    with pytest.raises(DataError, match="has 513 values, above 512"):
        checked_channels([str(number) for number in range(513)])
