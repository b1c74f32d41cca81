"""Classifiers against transformers' own `…ForSequenceClassification`: loss, gradients, and the exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from headed import CLASSES, LABELS, classifier, make_base, stepped, write_run
from rank_server import RankServer
from transformers import AutoModelForSequenceClassification

CASES = {kind: "dense" for kind in LABELS} | {"single_label_classification, tied": "biased"}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_transformers(case: str, ranks: RankServer, tmp_path: Path) -> None:
    kind = case.split(",", maxsplit=1)[0]
    run = write_run(classifier(tmp_path, kind, make_base(tmp_path, CASES[case])), tmp_path / "run")
    (found,) = ranks.run(stepped, world_size=1, run_dir=str(run), folder=str(tmp_path / "hf"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    loss = _loss(theirs, found["rows"])
    loss.backward()
    assert found["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert expected.keys() == found["gradients"].keys()
    for name, gradient in expected.items():
        own = torch.from_numpy(found["gradients"][name])
        assert float((own - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1e-3 * found["norm"]), name
    assert float(theirs.score.weight.std()) == pytest.approx(0.2, rel=0.3), "drawn with the model's own deviation"


def _loss(model: Any, rows: list[Any]) -> torch.Tensor:
    """transformers' loss of all rows as one padded batch."""
    longest = max(len(ids) for ids, _ in rows)
    ids_NT = torch.full((len(rows), longest), model.config.pad_token_id)
    mask_NT = torch.zeros_like(ids_NT)
    for row, (ids, _) in enumerate(rows):
        ids_NT[row, : len(ids)] = torch.from_numpy(ids)
        mask_NT[row, : len(ids)] = 1
    labels = torch.tensor([[value for name, value in columns.items() if "label" in name] for _, columns in rows])
    if model.config.problem_type == "single_label_classification":
        labels = labels.long()
    labels = labels[:, 0] if labels.shape[1] == 1 else labels
    loss: torch.Tensor = model(input_ids=ids_NT, attention_mask=mask_NT, labels=labels).loss
    return loss


def test_the_exported_folder_classifies_texts_as_transformers_tokenises_them(
    ranks: RankServer, tmp_path: Path
) -> None:
    run = write_run(
        classifier(tmp_path, "single_label_classification", make_base(tmp_path, "dense")), tmp_path / "run"
    )
    (found,) = ranks.run(stepped, world_size=1, run_dir=str(run), folder=str(tmp_path / "hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = (tmp_path / "single_label_classification.jsonl").read_text()
    decoded = {tokenizer.decode(ids): ids for ids, _ in found["rows"]}
    plain = [text for text in decoded if "<|im_start|>" not in text]
    turns = [text for text in decoded if "<|im_start|>" in text]
    assert plain and turns
    for text in plain:
        assert text in texts
        assert tokenizer(text)["input_ids"] == decoded[text].tolist()
    for text in turns:
        said = [{"role": "user", "content": text.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0]}]
        assert tokenizer.apply_chat_template(said, tokenize=False) == text


def test_adapters_beside_a_head_are_those_of_peft(ranks: RankServer, tmp_path: Path) -> None:
    base = make_base(tmp_path, "dense")
    lora: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}
    made = classifier(tmp_path, "single_label_classification", base, tuner=lora, bridge={"merge_lora": False})
    (found,) = ranks.run(
        stepped, world_size=1, run_dir=str(write_run(made, tmp_path / "run")), folder=str(tmp_path / "adapter")
    )
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=CLASSES, dtype=torch.float32)
    model.config.pad_token_id = 0
    model.config.problem_type = "single_label_classification"
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    assert "score" in theirs.peft_config["default"].modules_to_save
    loss = _loss(theirs, found["rows"])
    loss.backward()
    assert found["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert found["norm"] == pytest.approx(float(norm), rel=1e-5)
    (score,) = [gradient for name, gradient in gradients.items() if "score" in name]
    own = torch.from_numpy(found["gradients"]["score.weight"])
    assert list(found["gradients"]) == ["score.weight"]
    assert float((own - score).norm()) <= 1e-5 * float(score.norm())
