"""Every loss of GRPO equals its formula on padded matrices, in value and gradient."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from completions import (
    Completions,
    Given,
    as_pack,
    computed,
    kept_tokens,
    made,
    objective_of,
    on_row,
    reference_loss,
    settings,
)

from megabatch.trainer.objectives.grpo import NORMS
from megabatch.trainer.objectives.objective import Norm

LOSSES = tuple(NORMS)
LEVELS = ("token", "sequence", "sequence_token")
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bounded": {"delta": 1.9},
    "no_kl": {"beta": 0.0},
    "too_far": {"off_policy_sequence_mask_delta": 0.05},
    "entropy": {"top_entropy_quantile": 0.3},
    "overlong": {},
    "corrected": {},
    "taught": {"teacher_kl_coef": 0.7},
}


CASES = [
    case
    for case in itertools.product(LOSSES, LEVELS, MASKS)
    if not (case[0] == "real" and case[2] in ("entropy", "bounded", "taught"))  # refused by the rules
]


@pytest.mark.parametrize(("loss", "level", "mask"), CASES)
def test_loss_and_gradient(loss: str, level: str, mask: str) -> None:
    grpo = settings(loss, importance_sampling_level=level, **MASKS[mask])
    found = made(overlong=mask == "overlong")
    logps = found.logps.clone().requires_grad_()
    numerator, count = reference_loss(
        replace(found, logps=logps), grpo, corrected=mask == "corrected", taught=mask == "taught"
    )
    expected = numerator / count
    gradient = torch.autograd.grad(expected, logps)[0] * (found.mask > 0)
    got, got_gradient, terms = computed(found, grpo, corrected=mask == "corrected", taught=mask == "taught")
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-9, atol=1e-12)
    assert terms.weight.item() == pytest.approx(count)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_ratio_that_fp32_cannot_hold(loss: str, level: str) -> None:
    """e^95 with an advantage of 0 or above: fp32 has the loss and the gradient of fp64."""
    grpo, found = settings(loss, importance_sampling_level=level), made()
    found.advantages[:3] = torch.tensor([0.0, 0.0, 1.5])
    found.old[:3] = found.logps[:3] - 95
    logps = found.logps.clone().requires_grad_()
    numerator, count = reference_loss(replace(found, logps=logps), grpo)
    expected = numerator / count
    gradient = torch.autograd.grad(expected, logps)[0] * (found.mask > 0)
    in_fp32 = Completions(**{name: getattr(found, name).float() for name in Completions.__dataclass_fields__})
    got, got_gradient, _ = computed(in_fp32, grpo)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(got_gradient.double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("delta", [None, 1.9])
def test_a_loss_that_fp32_cannot_hold_is_infinite_and_never_less(delta: float | None) -> None:
    """A bad completion that nothing bounds: the run ends, or leaves the update out."""
    found = made(4)
    found.advantages[:1], found.old[:1] = -1.0, found.logps[:1] - 95
    in_fp32 = Completions(**{name: getattr(found, name).float() for name in Completions.__dataclass_fields__})
    got, gradient, _ = computed(in_fp32, settings("grpo", delta=delta))
    assert math.isinf(got) == (delta is None) and gradient.isfinite().all() == (delta is not None)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_split_batch_has_the_same_sums(loss: str) -> None:
    """Numerators and counts of two micro-batches add up to those of one; bnpo divides by each one's own."""
    found, grpo = made(), settings(loss, off_policy_sequence_mask_delta=0.05)
    whole, (first, second) = computed(found, grpo)[2], [computed(found.part(part), grpo)[2]
                                                        for part in (slice(0, 4), slice(4, 8))]  # fmt: skip
    assert (first.numerator + second.numerator).item() == pytest.approx(whole.numerator.item(), rel=1e-9)
    assert first.weight + second.weight == whole.weight
    for name, mean in whole.metrics.items():
        both = first.metrics[name], second.metrics[name]
        assert sum(one.total for one in both).item() == pytest.approx(mean.total.item(), rel=1e-9)
        assert sum(one.count for one in both) == mean.count


def test_a_policy_on_its_own_completions_has_ratio_one() -> None:
    """Without the column `old`: the gradient is that of old = the policy as it is."""
    found, grpo = made(), settings("dapo", beta=0.0)
    pack, places = as_pack(found)
    logps = found.logps.clone().requires_grad_()
    terms = objective_of(grpo).terms({"logps": on_row(logps, pack, places)}, replace(pack, token_columns={}))
    terms.numerator.backward()
    expected = -(found.advantages[:, None] * found.mask)
    torch.testing.assert_close(logps.grad, expected)
    assert (terms.metrics["ratio"].total / terms.metrics["ratio"].count).item() == 1
    assert terms.metrics["clip_low"].total == terms.metrics["clip_high"].total == 0


def test_stale_completions_are_too_far_from_what_they_were_drawn_with() -> None:
    """With the column `sampled` the old policy, which is the policy as it is here, decides nothing of it."""
    found, grpo = made(), settings("grpo", beta=0.0, off_policy_sequence_mask_delta=0.05)
    pack, places = as_pack(found)
    logps, drawn = on_row(found.logps, pack, places), on_row(found.old, pack, places)
    far = (((found.old - found.logps) * found.mask).sum(1) / found.mask.sum(1) > 0.05) & (found.advantages < 0)
    expected = (far[:, None] * found.mask).sum().item()
    assert expected > 0
    for columns, tokens in (({"old": logps, "sampled": drawn}, expected), ({"old": logps}, 0)):
        terms = objective_of(grpo).terms({"logps": logps}, replace(pack, token_columns=columns))
        assert terms.metrics["too_far"].total == tokens


def test_metrics_are_means_over_tokens() -> None:
    found, grpo = made(), settings("grpo", log_entropy=True, off_policy_sequence_mask_delta=0.05)
    _, _, terms = computed(found, grpo)
    mask, ratio = found.mask, (found.logps - found.old).exp()
    advantages = found.advantages[:, None]
    d = found.reference - found.logps
    far = ((found.old - found.logps) * mask).sum(1) / mask.sum(1) > 0.05
    expected = {
        "ratio": ratio,
        "clip_low": (ratio < 0.8) & (advantages < 0),
        "clip_high": (ratio > 1.28) & (advantages > 0),
        "kl": d.exp() - d - 1,
        "entropy": found.entropies,
        "too_far": (far & (found.advantages < 0))[:, None].expand_as(ratio),
    }
    for name, values in expected.items():
        mean = terms.metrics[name]
        assert (mean.total / mean.count).item() == pytest.approx(((values * mask).sum() / mask.sum()).item()), name
        assert mean.total > 0, name


def test_the_entropy_threshold_is_that_of_all_micro_batches() -> None:
    found, objective = made(16), objective_of(settings("dapo", top_entropy_quantile=0.2))
    parts = [found.part(slice(0, 4)), found.part(slice(4, 16))]
    packs = [as_pack(part) for part in parts]
    entropies = [on_row(part.entropies, *pack) for part, pack in zip(parts, packs, strict=True)]
    prepared = objective.prepare([pack for pack, _ in packs], Given(entropies))
    expected = kept_tokens(found, 0.2)
    for pack, part, (_, places) in zip(prepared, (slice(0, 4), slice(4, 16)), packs, strict=True):
        mask = found.mask[part].flatten() > 0
        assert torch.equal(pack.token_columns["kept"][places][mask], expected[part].flatten()[mask].float())


def test_a_row_without_completions_adds_nothing() -> None:
    for loss in LOSSES:
        pack, _ = as_pack(made().part(slice(0, 0)))
        out = {"logps": torch.zeros(len(pack.ids_T), requires_grad=True)}
        columns = {name: torch.zeros(len(pack.ids_T)) for name in ("old", "reference")}
        terms = objective_of(settings(loss)).terms(out, replace(pack, token_columns=columns))
        assert terms.numerator == 0 and terms.weight == 0
        terms.numerator.backward()


def test_each_loss_names_its_denominator() -> None:
    assert {loss for loss, norm in NORMS.items() if norm is Norm.SEQUENCES} == {"grpo", "sapo", "dr_grpo"}
    assert {loss for loss, norm in NORMS.items() if norm is Norm.TOKENS} == {"dapo", "cispo", "fipo"}
