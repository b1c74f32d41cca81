"""DPO's losses, metrics and gradients are those of TRL's own trainer on the same model and batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_models import VOCAB, Models, computed, of_trl, sample, small_model

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.dpo import Dpo, Variant
from megabatch.trainer.objectives.preference_losses import LOSSES, Settings
from megabatch.trainer.pack import Pack, collate

PAIRS = 6
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected")  # fmt: skip


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    draw = random.Random(5)

    def ids(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(shortest, longest))]

    return [(ids(2, 6), ids(1, 9), ids(1, 9)) for _ in range(PAIRS)]


def samples(some: list[tuple[list[int], list[int], list[int]]]) -> list[Sample]:
    return [
        sample(prompt, answer, chosen=float(answer is chosen), margin=0.0)
        for prompt, chosen, rejected in some
        for answer in (chosen, rejected)
    ]


def packs() -> list[Pack]:
    """Two micro-batches, the second with padding and one without any sample."""
    made = samples(pairs())
    items = [number // 2 for number in range(2 * PAIRS)]
    blank = Sample(made[0].ids[:0], made[0].weights[:0], made[0].columns)
    return [
        collate(made[:4], items=items[:4]),
        collate(made[4:], items=[item - 2 for item in items[4:]], row_multiple=16),
        collate([], blank=blank, row_multiple=4),
    ]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(policy=small_model(1), reference=small_model(2))


@pytest.fixture(scope="module")
def trainer(models: Models, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """TRL's trainer; its collator makes the batch that it computes."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from megabatch.data.tokens import tokenizer

    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    made = DPOTrainer(
        model=models.models["policy"],
        ref_model=models.models["reference"],
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer.load(tokenizer_folder),
    )
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs()]
    yield made, made.data_collator(rows)


def expected(trainer: Any, **settings: Any) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    made, batch = trainer
    defaults = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.3, "label_smoothing": 0.0}
    defaults |= {
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
    }
    for name, value in {**defaults, **settings}.items():
        assert hasattr(made, name), f"TRL renamed {name}"
        setattr(made, name, value)
    made._metrics["train"].clear()
    made.model.train()
    loss, gradient = of_trl(made.model, lambda: made._compute_loss(made.model, batch, False))
    return loss, {name: made._metrics["train"][name][0] for name in METRICS}, gradient


def same(found: Any, other: Any) -> None:
    assert found[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6)
    for name in METRICS:
        assert found[1][name] == pytest.approx(other[1][name], rel=1e-5, abs=1e-6), name
    assert found[1]["loss"] == pytest.approx(found[0], rel=1e-6)
    largest = max(float(tensor.abs().max()) for tensor in other[2].values())
    assert found[2].keys() == other[2].keys()
    for name, tensor in other[2].items():
        assert (found[2][name] - tensor).abs().max() <= 1e-5 * largest, name


def variant(**fields: Any) -> Dpo:
    settings = Settings(beta=0.3, label_smoothing=fields.pop("label_smoothing", 0.0))
    return Dpo(Variant(settings=settings, **fields))


ALL = (*LOSSES, "aot", "aot_unpaired", "sft")
SMOOTHED = {"exo_pair": 0.01, "robust": 0.2, "aot": 0.1, "aot_unpaired": 0.1}


@pytest.mark.parametrize("name", ALL)
def test_each_loss(name: str, models: Models, trainer: Any) -> None:
    smoothing = SMOOTHED.get(name, 0.0)
    found = computed(variant(losses={name: 1.0}, label_smoothing=smoothing), packs(), models, total=PAIRS)
    same(found, expected(trainer, loss_types=[name], label_smoothing=smoothing))


def test_several_losses_with_weights(models: Models, trainer: Any) -> None:
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5, "aot": 0.4}
    found = computed(variant(losses=weights), packs(), models, total=PAIRS)
    same(found, expected(trainer, loss_types=list(weights), loss_weights=list(weights.values())))
    assert found[1]["nll_loss"] > 0


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_divergences(divergence: str, name: str, models: Models, trainer: Any) -> None:
    found = computed(variant(losses={name: 1.0}, divergence=divergence, alpha=0.7), packs(), models, total=PAIRS)
    other = expected(trainer, loss_types=[name], f_divergence_type=divergence, f_alpha_divergence_coef=0.7)
    same(found, other)


@pytest.mark.parametrize("name", ["sigmoid", "sft", "aot"])
def test_tokens_beyond_the_shorter_answer_count_less(name: str, models: Models, trainer: Any) -> None:
    found = computed(variant(losses={name: 1.0}, ld_alpha=0.4), packs(), models, total=PAIRS)
    same(found, expected(trainer, loss_types=[name], ld_alpha=0.4))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_down"])
def test_pairs_that_the_policy_finds_likely_count_more(name: str, models: Models, trainer: Any) -> None:
    made, batch = trainer
    found = computed(variant(losses={name: 1.0}, use_weighting=True, ld_alpha=0.4), packs(), models, total=PAIRS)
    same(found, expected(weighted(made, batch), loss_types=[name], use_weighting=True, ld_alpha=0.4))


def weighted(made: Any, batch: Any) -> Any:
    """TRL's trainer, whose model also returns what it weighs with."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(made.model, outputs=("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    return made, batch


def test_without_a_reference_every_answer_is_equally_likely(models: Models, trainer: Any) -> None:
    class Even(torch.nn.Module):
        """Each token has the probability 1, which no softmax gives."""

        def forward(self, *args: Any, labels: torch.Tensor, **kwargs: Any) -> Any:
            return type("Output", (), {"log_probs": torch.zeros(labels.shape[0], labels.shape[1] - 1)})

    made, _ = trainer
    own, made.ref_model = made.ref_model, Even()
    try:
        other = expected(trainer)
    finally:
        made.ref_model = own
    found = computed(variant(reference_free=True), packs(), Models(policy=models.models["policy"]), total=PAIRS)
    same(found, other)


def test_smoothing_of_the_sigmoid_by_hand(models: Models, trainer: Any) -> None:
    """TRL 1.16 has no conservative DPO: its losses of both orders, weighted."""
    found = computed(variant(label_smoothing=0.2), packs(), models, total=PAIRS)
    straight, margins = expected(trainer), []
    for pack in variant().prepare(packs(), models):  # type: ignore[arg-type]
        ratios = models.infer([pack], variant().readout)[0]["logps"] - pack.columns["reference"]
        margins += (0.3 * (ratios[0::2] - ratios[1::2])).tolist()
    swapped = sum(torch.nn.functional.softplus(torch.tensor(margin)).item() for margin in margins) / PAIRS
    assert found[0] == pytest.approx(0.8 * straight[0] + 0.2 * swapped, rel=1e-5)


def test_micro_batches_do_not_change_a_loss_of_the_whole_batch(models: Models) -> None:
    objective = variant(losses={"aot": 1.0, "aot_unpaired": 0.5, "sft": 0.3})
    made = samples(pairs())
    whole = [collate(made, items=[number // 2 for number in range(2 * PAIRS)])]
    one, several = (computed(objective, some, models, total=PAIRS) for some in (whole, packs()))
    assert one[0] == pytest.approx(several[0], rel=1e-6)
    for name, tensor in one[2].items():
        torch.testing.assert_close(several[2][name], tensor, rtol=1e-4, atol=1e-6)
