"""Distillation's losses and gradients are those of TRL's own trainer over the whole vocabulary, and by hand over a few
tokens."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preference_models import VOCAB, Models, computed, of_trl, row_logits, sample, small_model

from megabatch.trainer.objectives.gkd import TEACHER, FrozenTeacher, Gkd, GkdOfTop, GkdOfWhole, GkdSettings, divergence
from megabatch.trainer.pack import Pack, collate
from megabatch.trainer.readouts.teachers_distribution import OutputLayer
from megabatch.trainer.readouts.top_tokens import TopTokens


def packs() -> list[Pack]:
    """Two micro-batches, of which one is padded."""
    draw = random.Random(2)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, longest))]

    samples = [sample(ids(6), ids(9)) for _ in range(5)]
    return [collate(samples[:2]), collate(samples[2:], row_multiple=16)]


class Hidden:
    """A model without its output layer: hidden states in place of logits."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self._model.model(ids).last_hidden_state)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(policy=small_model(1), teacher=small_model(2, hidden_size=48, num_hidden_layers=1))


def settings(**changed: Any) -> GkdSettings:
    return GkdSettings(**{"beta": 0.5, "temperature": 1.0, "sft_alpha": 0.0, **changed})


def of_top(topk: int, **changed: Any) -> Gkd:
    return GkdOfTop(settings(**changed), FrozenTeacher(TopTokens(topk, VOCAB)), topk=topk)


def of_whole(models: Models, **changed: Any) -> tuple[Gkd, Models]:
    """The objective, and the models that it is computed with: the teacher has lost its output layer."""
    teacher = models.models[TEACHER]
    weight_VH, vocab = teacher.lm_head.weight.detach()[:VOCAB], teacher.config.vocab_size
    layer = OutputLayer(hidden_size=48, dtype=torch.float32, vocab_size=vocab, weight_RH=weight_VH)
    return GkdOfWhole(settings(**changed), [layer]), Models(policy=models.models["policy"], teacher=Hidden(teacher))


def learned(some: list[Pack]) -> float:
    return float(sum(pack.weights_T.sum() for pack in some))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_over_the_whole_vocabulary_as_in_trl(beta: float, temperature: float, whole: bool, models: Models) -> None:
    from trl.experimental.gkd import GKDTrainer

    def loss() -> torch.Tensor:
        both = (models.models["policy"], models.models[TEACHER])
        logits = [torch.cat([row_logits(model, pack) for pack in packs()]) for model in both]
        labels = torch.cat([pack.targets_T.where(pack.weights_T > 0, -100) for pack in packs()])
        return GKDTrainer.generalized_jsd_loss(
            logits[0][None], logits[1].detach()[None], labels=labels[None], beta=beta, temperature=temperature
        )

    expected, gradient = of_trl(models.models["policy"], loss)
    how = {"beta": beta, "temperature": temperature}
    objective, used = of_whole(models, **how) if whole else (of_top(VOCAB, **how), models)
    found = computed(objective, packs(), used, total=learned(packs()))
    assert found[0] == pytest.approx(expected, rel=1e-5)
    largest = max(float(tensor.abs().max()) for tensor in gradient.values())
    for name, tensor in gradient.items():
        assert (found[2][name] - tensor).abs().max() <= 1e-5 * largest, name


def test_over_the_teachers_few_most_likely_tokens_by_hand(models: Models) -> None:
    found = computed(of_top(3, sft_alpha=0.2), packs(), models, total=learned(packs()))
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


def test_the_answers_own_loss_beside_the_whole_vocabularys(models: Models) -> None:
    objective, used = of_whole(models, sft_alpha=0.2)
    found = computed(objective, packs(), used, total=learned(packs()))
    other = computed(of_top(VOCAB, sft_alpha=0.2), packs(), models, total=learned(packs()))
    assert found[1] == pytest.approx(other[1], rel=1e-5)
    for name, tensor in other[2].items():
        torch.testing.assert_close(found[2][name], tensor, rtol=1e-4, atol=1e-6)


def test_tokens_that_the_teacher_lacks_count_in_the_answers_own_loss() -> None:
    policy = small_model(1, vocab_size=VOCAB + 4)
    objective, used = of_whole(Models(policy=policy, teacher=small_model(2, hidden_size=48)), sft_alpha=0.2)
    nll, weight = 0.0, learned(packs())
    for pack in packs():
        logps_TV = row_logits(policy, pack).detach().log_softmax(1)
        nll -= float((logps_TV.gather(1, pack.targets_T[:, None])[:, 0] * pack.weights_T).sum())
    assert computed(objective, packs(), used, total=weight)[1]["nll_loss"] == pytest.approx(nll / weight, rel=1e-5)


def test_a_teacher_with_a_larger_vocabulary_names_no_token_that_the_student_lacks() -> None:
    wide = Models(policy=small_model(1), teacher=small_model(2, vocab_size=VOCAB + 40))
    prepared = of_top(8).prepare(packs(), wide)  # type: ignore[arg-type]
    assert max(int(pack.token_columns["teacher_ids"].max()) for pack in prepared) < VOCAB


def test_a_divergence_from_itself_is_nothing() -> None:
    logps = torch.randn(4, 5).log_softmax(1)
    for beta in (0, 0.3, 1):
        assert divergence(logps, logps, beta).abs().max() < 1e-6
