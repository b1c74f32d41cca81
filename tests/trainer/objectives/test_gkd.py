"""Distillation's losses and gradients are those of TRL's own trainer, over all tokens, and by hand over a few."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from preference_models import VOCAB, Models, computed, of_trl, row_logits, sample, small_model

from megabatch.trainer.objectives.gkd import TEACHER, Gkd, GkdSettings, divergence
from megabatch.trainer.pack import Pack, collate


def packs() -> list[Pack]:
    """Two micro-batches, of which one is padded."""
    draw = random.Random(2)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, longest))]

    samples = [sample(ids(6), ids(9)) for _ in range(5)]
    return [collate(samples[:2]), collate(samples[2:], row_multiple=16)]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(policy=small_model(1), teacher=small_model(2, hidden_size=48, num_hidden_layers=1))


def settings(**changed: Any) -> GkdSettings:
    return GkdSettings(
        **{"beta": 0.5, "temperature": 1.0, "topk": VOCAB, "sft_alpha": 0.0, "vocab_size": VOCAB, **changed}
    )


def learned(some: list[Pack]) -> float:
    return float(sum(pack.weights_T.sum() for pack in some))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_over_the_whole_vocabulary_as_in_trl(beta: float, temperature: float, models: Models) -> None:
    from trl.experimental.gkd import GKDTrainer

    def loss() -> torch.Tensor:
        both = (models.models["policy"], models.models[TEACHER])
        logits = [torch.cat([row_logits(model, pack) for pack in packs()]) for model in both]
        labels = torch.cat([pack.targets_T.where(pack.weights_T > 0, -100) for pack in packs()])
        return GKDTrainer.generalized_jsd_loss(
            logits[0][None], logits[1].detach()[None], labels=labels[None], beta=beta, temperature=temperature
        )

    expected, gradient = of_trl(models.models["policy"], loss)
    objective = Gkd(settings(beta=beta, temperature=temperature))
    found = computed(objective, packs(), models, total=learned(packs()))
    assert found[0] == pytest.approx(expected, rel=1e-5)
    largest = max(float(tensor.abs().max()) for tensor in gradient.values())
    for name, tensor in gradient.items():
        assert (found[2][name] - tensor).abs().max() <= 1e-5 * largest, name


def test_over_the_teachers_few_most_likely_tokens_by_hand(models: Models) -> None:
    found = computed(Gkd(settings(topk=3, sft_alpha=0.2)), packs(), models, total=learned(packs()))
    apart, nll = 0.0, 0.0
    with torch.no_grad():
        for pack in packs():
            student, teacher = (row_logits(models.models[name], pack) for name in ("policy", TEACHER))
            for place in pack.weights_T.nonzero()[:, 0].tolist():
                best = teacher[place].topk(3).indices
                p, q = (logits[place, best].softmax(0) for logits in (teacher, student))
                mixed = (p + q) / 2
                apart += float((p * (p / mixed).log() + q * (q / mixed).log()).sum()) / 2
                nll -= float(student[place].log_softmax(0)[pack.targets_T[place]])
    assert found[1]["divergence"] == pytest.approx(apart / learned(packs()), rel=1e-5)
    assert found[1]["nll_loss"] == pytest.approx(nll / learned(packs()), rel=1e-5)
    assert found[0] == pytest.approx((apart + 0.2 * nll) / learned(packs()), rel=1e-5)


def test_a_teacher_with_a_larger_vocabulary_names_no_token_that_the_student_lacks() -> None:
    wide = Models(policy=small_model(1), teacher=small_model(2, vocab_size=VOCAB + 40))
    prepared = Gkd(settings(topk=8)).prepare(packs(), wide)  # type: ignore[arg-type]
    assert max(int(pack.token_columns["teacher_ids"].max()) for pack in prepared) < VOCAB


def test_a_divergence_from_itself_is_nothing() -> None:
    logps = torch.randn(4, 5).log_softmax(1)
    for beta in (0, 0.3, 1):
        assert divergence(logps, logps, beta).abs().max() < 1e-6
