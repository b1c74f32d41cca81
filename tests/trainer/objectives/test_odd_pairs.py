"""Odd rows, from their text to the loss: what DPO, KTO and reward models make of them is what TRL's trainers make.

TRL's collators take the tokens of our rows, since its templates also learn the line break after a turn, and cut them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from preference_models import Models, computed, gradient, of_trl, small_model

from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.dpo import Dpo, Variant
from megabatch.trainer.objectives.kto import Kto, KtoSettings
from megabatch.trainer.objectives.preference_losses import Settings
from megabatch.trainer.objectives.rm import Rm
from megabatch.trainer.pack import Pack, collate

LONG = "long " * 6
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}]}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "one token": {"prompt": "3 + 4?", "chosen": "7", "rejected": "8"},
    "rejected is a prefix": {"prompt": "Go", "chosen": "a b c d", "rejected": "a b"},
    "chosen is a prefix": {"prompt": "Go", "chosen": "a b", "rejected": "a b c d"},
    "all but the last token": {"prompt": "Count", "chosen": "1 2 3 4 5 6 7", "rejected": "1 2 3 4 5 6 8"},
    "unicode": {"prompt": "你好 ✨ ñ", "chosen": "e\u0301 👩\u200d🔬 \u200fשלום", "rejected": "\u200b é"},
    "spaces": {"prompt": " Go ", "chosen": " a", "rejected": "a "},
    "system and turns": {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ],
        "chosen": [{"role": "assistant", "content": "Bye."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "tools": {
        "prompt": [{"role": "user", "content": "Add"}, CALL, {"role": "tool", "content": "3"}],
        "chosen": [{"role": "assistant", "content": "It is 3"}],
        "rejected": [{"role": "assistant", "content": "It is 4"}],
        "tools": [TOOL],
    },
    "long prompt": {"prompt": LONG, "chosen": "yes", "rejected": "no"},
    "long chosen": {"prompt": "Go", "chosen": LONG + "end", "rejected": "no"},
    "long answers": {"prompt": "Go", "chosen": "good " + LONG, "rejected": "bad " + LONG + LONG},
    "alike until they are cut": {"prompt": "Go", "chosen": LONG + "good", "rejected": LONG + "bad"},
}
DPO = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
KTO = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
LIMIT = 24
BETA = 0.1


def items(folder: Path, rows: str, *, limit: int | None = None, strategy: str = "delete") -> list[list[Sample]]:
    how: dict[str, Any] = {"rows": rows, "loss_scale": "last_round", "mismatches": rows == "judged"}
    encoder = Encoder(Encoding(tokenizer=folder, max_length=limit, truncation_strategy=strategy, **how))  # type: ignore[arg-type]
    chunk = encoder.encode([Row(Origin("rows.jsonl", n), row) for n, row in enumerate(ROWS.values(), 1)])
    parts = iter(chunk.samples)
    return [
        [Sample(one.ids, one.weights, one.columns) for one in islice(parts, count)] for count in chunk.items if count
    ]


def halves(one: Sample) -> tuple[list[int], list[int]]:
    """Tokens up to the first learned one, and from there to the last learned one: without the line break after it."""
    learned = np.flatnonzero(one.weights)
    assert len(learned) == learned[-1] - learned[0] + 1, "one piece"
    return one.ids[: learned[0]].tolist(), one.ids[learned[0] : learned[-1] + 1].tolist()


def answer(one: Sample) -> dict[str, Any]:
    """As KTO's collator takes it."""
    prompt, said = halves(one)
    return {"prompt_ids": prompt, "completion_ids": said, "label": bool(one.columns["label"])}


def packs(made: Sequence[Sequence[Sample]]) -> list[Pack]:
    """Two micro-batches."""
    middle = len(made) // 2
    return [
        collate([one for item in some for one in item], items=[n for n, item in enumerate(some) for _ in item])
        for some in (made[:middle], made[middle:])
    ]


@pytest.fixture(scope="module")
def models(bpe: Any) -> Models:
    return Models(policy=small_model(1, vocab_size=len(bpe)), reference=small_model(2, vocab_size=len(bpe)))


@pytest.fixture(scope="module")
def common(models: Models, bpe: Any) -> dict[str, Any]:
    return {
        "model": models.models["policy"], "ref_model": models.models["reference"], "processing_class": bpe,
    }  # fmt: skip


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, "beta": BETA, "max_length": None,
    }  # fmt: skip


def loss_of(trainer: Any, batch: Any, names: Sequence[str]) -> Any:
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss, grads = of_trl(trainer.model, lambda: trainer._compute_loss(trainer.model, batch, False))
    return loss, {name: trainer._metrics["train"][name][0] for name in names}, grads


def same(found: Any, other: Any, names: Sequence[str]) -> None:
    assert found[0] == pytest.approx(other[0], rel=1e-5)
    for name in names:  # rewards are differences of sums of hundreds
        assert found[1][name] == pytest.approx(other[1][name], rel=1e-5, abs=1e-5), name
    largest = max(float(tensor.abs().max()) for tensor in other[2].values())
    assert found[2].keys() == other[2].keys()
    for name, tensor in other[2].items():
        assert (found[2][name] - tensor).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("strategy", ["delete", "right", "left"])
def test_dpo(strategy: str, models: Models, common: dict[str, Any], tokenizer_folder: Path, tmp_path: Path) -> None:
    """All rows whole, and cut at either end; a pair that is the same once it is cut is dropped."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = DPOTrainer(**common, args=DPOConfig(**arguments(tmp_path)), train_dataset=Dataset.from_list([row]))
    limit = None if strategy == "delete" else LIMIT
    whole = [[halves(one) for one in item] for item in items(tokenizer_folder, "pairs")]
    assert len(whole) == len(ROWS)
    examples = [{"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad} for (prompt, good), (_, bad) in whole]
    if strategy == "right":
        trainer.data_collator.max_length = limit
        examples = [one for one in examples if len(one["prompt_ids"]) < LIMIT]  # as TRL does
    elif strategy == "left":
        trainer.data_collator.max_length = LIMIT - 1  # we keep the line break after an answer
        trainer.data_collator.truncation_mode = "keep_end"
    cut = trainer.data_collator(examples)["input_ids"].tolist()
    examples = [one for one, good, bad in zip(examples, cut, cut[len(examples) :], strict=False) if good != bad]
    found = items(tokenizer_folder, "pairs", limit=limit, strategy=strategy)
    assert len(found) == len(examples) < len(cut) / 2 + (limit is None)
    dpo = Dpo(Variant(settings=Settings(beta=BETA)))
    expected = loss_of(trainer, trainer.data_collator(examples), DPO)
    same(computed(dpo, packs(found), models, total=len(found)), expected, DPO)


@pytest.mark.parametrize("strategy", ["delete", "right", "left"])
def test_kto(strategy: str, models: Models, common: dict[str, Any], tokenizer_folder: Path, tmp_path: Path) -> None:
    """Each pair is a good and a bad answer, whose mismatched ones TRL gets from us; TRL cuts at the end alone."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    row = {"prompt": "a", "completion": "b", "label": True}
    trainer = KTOTrainer(
        **common,
        args=KTOConfig(**arguments(tmp_path), train_sampling_strategy="sequential"),
        train_dataset=Dataset.from_list([row, {**row, "label": False}]),
    )
    found = items(tokenizer_folder, "judged", limit=None if strategy == "delete" else LIMIT, strategy=strategy)
    cut = found if strategy == "left" else items(tokenizer_folder, "judged")
    pairs = [pair for item in cut for pair in zip(item[::2], item[1::2], strict=True)]
    examples = [[answer(one) for one in pair] for pair in pairs]
    if strategy == "right":
        trainer.data_collator.max_length = LIMIT
        examples = [pair for pair in examples if len(pair[0]["prompt_ids"]) < LIMIT]
    count = sum(len(item) for item in found)
    assert count == 2 * len(examples)
    own, other = (trainer.data_collator(list(some)) for some in zip(*examples, strict=True))
    batch = {**own, **{f"KL_{name}": value for name, value in other.items() if name != "label"}}
    same(computed(Kto(KtoSettings(beta=BETA)), packs(found), models, total=count), loss_of(trainer, batch, KTO), KTO)


class PerToken(torch.nn.Module):
    """A classifier of transformers' whose logits are those of every token."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.inner.score(self.inner.model(ids).last_hidden_state))


@pytest.mark.parametrize("strategy", ["delete", "left", "right"])
def test_rm(strategy: str, bpe: Any, tokenizer_folder: Path) -> None:
    from trl.trainer import reward_trainer

    config = small_model(3, vocab_size=len(bpe)).config
    config.num_labels, config.pad_token_id = 1, bpe.pad_token_id
    model = transformers.Qwen3ForSequenceClassification(config)
    made = items(tokenizer_folder, "pairs", limit=None if strategy == "delete" else LIMIT, strategy=strategy)
    collator = reward_trainer.DataCollatorForPreference(pad_token_id=bpe.pad_token_id)
    examples = [{"chosen_ids": a.ids.tolist(), "rejected_ids": b.ids.tolist(), "margin": 0.5} for a, b in made]
    same_gather = SimpleNamespace(gather=lambda values: values, gather_for_metrics=lambda values: values)
    this = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=0.01),
        accelerator=same_gather, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    batch = collator(examples)
    loss, grads = of_trl(model, lambda: reward_trainer.RewardTrainer.compute_loss(this, model, batch))
    names = ("accuracy", "margin", "mean_reward")
    other = loss, {name: this._metrics["eval"][name][0] for name in names}, grads
    given = [[Sample(one.ids, one.weights, {**one.columns, "margin": 0.5}) for one in item] for item in made]
    models = Models(policy=PerToken(model))
    loss, means, _ = computed(Rm(center_rewards_coefficient=0.01), packs(given), models, total=len(given))
    same((loss, means, gradient(model)), other, names)
