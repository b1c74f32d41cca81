"""KTO's losses, metrics and gradients are those of TRL's own trainer on the same model and batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from preference_models import VOCAB, Models, computed, of_trl, sample, small_model

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.kto import Kto, KtoSettings
from megabatch.trainer.pack import Pack, collate

METRICS = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
LABELS = (1, 1, 0, 1, 0)
SEEDS = (6, 3)


def rows(seed: int = SEEDS[0]) -> list[dict[str, Any]]:
    """As TRL's collator takes them: each with the answer of the row before it."""
    draw = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, longest))]

    made = [{"prompt_ids": ids(6), "completion_ids": ids(9), "label": bool(label)} for label in LABELS]
    return [{**row, "KL_completion_ids": made[n - 1]["completion_ids"]} for n, row in enumerate(made)]


def packs(*, kl: bool = True, seed: int = SEEDS[0]) -> list[Pack]:
    """Two micro-batches, and one without samples."""
    samples, items = [], []
    for number, row in enumerate(rows(seed)):
        label, answers = float(row["label"]), [(row["completion_ids"], 1.0)]
        answers += [(row["KL_completion_ids"], 0.0)] if kl else []
        samples += [sample(row["prompt_ids"], answer, label=label, matched=matched) for answer, matched in answers]
        items += [number] * len(answers)
    cut = 2 * (1 + kl)
    blank = Sample(samples[0].ids[:0], samples[0].weights[:0], samples[0].columns)
    return [
        collate(samples[:cut], items=items[:cut]),
        collate(samples[cut:], items=[item - 2 for item in items[cut:]], row_multiple=16),
        collate([], blank=blank, row_multiple=4),
    ]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(policy=small_model(1), reference=small_model(2))


@pytest.fixture(scope="module")
def trainer(models: Models, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from megabatch.data.tokens import tokenizer

    made = KTOTrainer(
        model=models.models["policy"],
        ref_model=models.models["reference"],
        args=KTOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": n == 0} for n in range(2)]),
        processing_class=tokenizer.load(tokenizer_folder),
    )
    yield made, made.data_collator(rows())


def expected(trainer: Any, **settings: Any) -> tuple[float, dict[str, float], dict[str, Any]]:
    made, batch = trainer
    defaults = {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    for name, value in {**defaults, "calculate_KL": True, **settings}.items():
        assert hasattr(made, name), f"TRL renamed {name}"
        setattr(made, name, value)
    made._metrics["train"].clear()
    made.model.train()
    loss, gradient = of_trl(made.model, lambda: made._compute_loss(made.model, batch, False))
    return loss, {name: made._metrics["train"][name][0] for name in METRICS}, gradient


def same(found: Any, other: Any) -> None:
    assert found[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6)
    for name in METRICS:  # differences of sums of some 30, whose last bits are those of the processor
        assert found[1][name] == pytest.approx(other[1][name], rel=1e-5, abs=5e-6), name
    assert found[1]["loss"] == pytest.approx(found[0], rel=1e-6)
    largest = max(float(tensor.abs().max()) for tensor in other[2].values())
    for name, tensor in other[2].items():
        assert (found[2][name] - tensor).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
def test_kto(weights: tuple[float, float], models: Models, trainer: Any) -> None:
    good, bad = weights
    other = expected(trainer, desirable_weight=good, undesirable_weight=bad)
    settings = KtoSettings(beta=0.3, desirable_weight=good, undesirable_weight=bad)
    same(computed(Kto(settings), packs(), models, total=2 * len(LABELS)), other)


def test_a_negative_kl_counts_as_none(models: Models, trainer: Any) -> None:
    """Of the two batches one has a positive KL, and one that is clamped at 0."""
    made, _ = trainer
    found = []
    for seed in SEEDS:
        other = expected((made, made.data_collator(rows(seed))))
        same(computed(Kto(KtoSettings(beta=0.3)), packs(seed=seed), models, total=2 * len(LABELS)), other)
        found.append(other[1]["kl"])
    assert min(found) == 0 < max(found)


def test_apo_zero_unpaired_needs_no_mismatched_answers(models: Models, trainer: Any) -> None:
    other = expected(trainer, loss_type="apo_zero_unpaired", calculate_KL=False)
    settings = KtoSettings(beta=0.3, uses_kl=False)
    same(computed(Kto(settings), packs(kl=False), models, total=len(LABELS)), other)


def test_metrics_of_answers_of_one_kind(models: Models) -> None:
    made = packs()[:1]  # of good answers alone
    _, found, _ = computed(Kto(KtoSettings(uses_kl=True)), made, models, total=4)
    assert found["rewards/chosen"] != 0
    assert 0 <= found["rewards/accuracies"] <= 1
