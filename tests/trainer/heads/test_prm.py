"""Process reward models against transformers' `…ForTokenClassification`, at several layouts, and resumed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from headed import GROUPS, make_base, merged, stepped
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_run
from transformers import AutoModelForTokenClassification, AutoTokenizer

from megabatch import Model, Prm, Recipe, Rlhf
from megabatch.trainer.evaluation import measures

PACKED: dict[str, Any] = {"packing": True, "packing_length": 256}
LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}


def write_rows(path: Path, *, count: int, seed: int) -> Path:
    """Sums in steps of unequal number, some of them wrong."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            total, steps, labels = 0, [], []
            for number in (numbers := [draw.randint(0, 99) for _ in range(draw.randint(1, 4))]):
                labels.append(draw.random() < 0.6)
                total += number + (not labels[-1])
                steps.append(f"That is {total}.")
            row = {"prompt": f"{' + '.join(map(str, numbers))}?", "completions": steps, "labels": labels}
            file.write(json.dumps(row) + "\n")
    return path


def made(folder: Path, ranks: int = 1, *, model: str = "qwen2", prm: Prm | None = None, **groups: Any) -> Recipe:
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl", count=40, seed=0)
        write_rows(folder / "validation.jsonl", count=9, seed=1)
    every = merged(merged(GROUPS, {"optimizer": {"weight_decay": 0.0}}), groups)
    every = merged(every, {"resources": {"tasks_per_node": ranks}})
    return replace(recipe(folder, model, **every), task="rlhf", rlhf=Rlhf(rlhf_type="prm"), prm=prm or Prm())


def padded_batch(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The step's rows as one padded batch of transformers."""
    rows = [ids for ids, _ in found["rows"]]
    ids_NT, labels_NT = torch.full((2, len(rows), max(map(len, rows))), -100)
    mask_NT = torch.zeros_like(ids_NT)
    for row, (ids, labels) in enumerate(zip(rows, found["labels"], strict=True)):
        ids_NT[row, : len(ids)], labels_NT[row, : len(ids)] = torch.from_numpy(ids), torch.from_numpy(labels)
        mask_NT[row, : len(ids)] = 1
    return {"input_ids": ids_NT.clamp(min=0), "attention_mask": mask_NT, "labels": labels_NT}


def base_of(folder: Path, name: str) -> tuple[Path, Model]:
    base = make_base(folder, name)
    return base, Model(model=str(base), torch_dtype="float32")


def test_loss_and_gradients_are_those_of_transformers(ranks: RankServer, tmp_path: Path) -> None:
    one = replace(made(tmp_path, data=PACKED, batch={"micro_batch_size": 2}), model=base_of(tmp_path, "biased")[1])
    (found,) = ranks.run(
        stepped, world_size=1, run_dir=str(write_run(one, tmp_path / "run")), folder=str(tmp_path / "hf")
    )
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert theirs.config.step_separator == "\n" and theirs.score.bias is not None
    loss = theirs(**padded_batch(found)).loss
    loss.backward()
    assert found["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert expected.keys() == found["gradients"].keys() >= {"score.weight", "score.bias"}
    for key, gradient in expected.items():
        own = torch.from_numpy(found["gradients"][key])
        assert float((own - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1e-3 * found["norm"]), key


def test_adapters_beside_a_head_are_those_of_peft(ranks: RankServer, tmp_path: Path) -> None:
    base, model = base_of(tmp_path, "dense")
    one = replace(made(tmp_path, tuner=LORA, bridge={"merge_lora": False}), model=model)
    (found,) = ranks.run(
        stepped, world_size=1, run_dir=str(write_run(one, tmp_path / "run")), folder=str(tmp_path / "adapter")
    )
    bare = AutoModelForTokenClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter", is_trainable=True).eval()
    assert theirs.peft_config["default"].task_type == "TOKEN_CLS"
    loss = theirs(**padded_batch(found)).loss
    loss.backward()
    assert found["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert found["norm"] == pytest.approx(float(norm), rel=1e-5)
    assert {*found["gradients"]} == {"score.weight", "score.bias"}
    for name, gradient in gradients.items():
        if ".score." in name:
            own = torch.from_numpy(found["gradients"]["score." + name.rpartition(".")[2]])
            assert float((own - gradient).norm()) <= 1e-5 * float(gradient.norm())


@pytest.fixture(scope="module")
def reference(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(made(folder := tmp_path_factory.mktemp("prm")), folder / "one")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    return run


def test_the_export_is_the_model_that_was_evaluated(reference: Path) -> None:
    (folder,) = (reference / "checkpoints").glob("step_*/hf")
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for line in (reference.parent / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids, ends = tokenizer(text, add_special_tokens=False)["input_ids"], []
        for step in row["completions"]:
            ids += tokenizer(step, add_special_tokens=False)["input_ids"] + tokenizer.encode("\n")
            ends.append(len(ids) - 1)
        answers.append((model(torch.tensor([ids])).logits[0, ends].detach(), torch.tensor(row["labels"]).long()))
    scores, labels = (torch.cat(some) for some in zip(*answers, strict=True))
    last = metrics(reference, "eval")[-1]
    assert last["eval_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(scores, labels)), rel=1e-5)
    assert last["eval_accuracy"] == pytest.approx(float((scores.argmax(1) == labels).float().mean()))
    chances, right = scores.softmax(1).double().numpy(), labels.numpy() == 1
    assert last["eval_auc"] == pytest.approx(measures.auc(chances[:, 1], right))
    assert last["eval_brier"] == pytest.approx(measures.brier(chances[:, 1], right), rel=1e-5)
    assert last["eval_ece"] == pytest.approx(
        measures.calibration_error(chances.max(1), chances.argmax(1) == right), rel=1e-5
    )
    first = [[*said.argmax(1).tolist(), 0].index(0) == [*true.tolist(), 0].index(0) for said, true in answers]
    assert last["eval_first_error"] == pytest.approx(sum(first) / len(first))


def test_a_run_resumes_at_another_layout_and_evaluates_the_same(ranks: RankServer, reference: Path) -> None:
    """Context parallelism cuts an answer's steps over ranks."""
    folder = reference.parent
    run = write_run(made(folder, 2, parallel={"context_parallel_size": 2}), folder / "cut")
    assert ranks.run(train, world_size=2, run_dir=str(run), stop_after=2) == [75, 75]
    write_run(made(folder, 2, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}), run)
    assert ranks.run(train, world_size=2, run_dir=str(run)) == [0, 0]
    for found, expected in zip(curve(run), curve(reference), strict=True):
        assert found == pytest.approx(expected, rel=2e-5)
    evaluated = [(one, two) for one, two in zip(metrics(run, "eval"), metrics(reference, "eval"), strict=True)]
    assert [one["step"] for one, _ in evaluated] == [0, 2, 4]
    for found, expected in evaluated:
        for name in ("eval_loss", "eval_accuracy", "eval_auc", "eval_ece", "eval_brier", "eval_first_error"):
            assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), (found["step"], name)


def test_the_last_steps_alone_are_trained_and_all_are_evaluated(ranks: RankServer, reference: Path) -> None:
    folder, last = reference.parent, Prm(train_on_last_step_only=True)
    run = write_run(made(folder, prm=last), folder / "last")
    (found,) = ranks.run(stepped, world_size=1, run_dir=str(run), folder=str(folder / "hf"))
    batch = padded_batch(found)
    for row in batch["labels"]:
        row[torch.nonzero(row >= 0)[:-1]] = -100
    with torch.no_grad():
        model = AutoModelForTokenClassification.from_pretrained(folder / "hf", dtype=torch.float32).eval()
        expected = float(model(**batch).loss)
    assert found["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)
    cut = {"parallel": {"context_parallel_size": 2}, "training": {"train_iters": 1}}
    two = write_run(made(folder, 2, prm=last, **cut), folder / "two")
    assert ranks.run(train, world_size=2, run_dir=str(two)) == [0, 0]
    assert metrics(two, "train")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    for name in ("eval_loss", "eval_accuracy", "eval_auc"):
        assert metrics(two, "eval")[0][name] == pytest.approx(metrics(reference, "eval")[0][name], rel=2e-5)


def test_steps_of_one_label_teach_nothing(ranks: RankServer, reference: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": str(n), "completions": ["a"], "labels": [1]}) for n in range(8)))
    run = write_run(made(reference.parent, data={"dataset": [str(rows)]}), tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"rows.jsonl:1: has right steps alone, as all rows have"):
        ranks.run(stepped, world_size=1, run_dir=str(run), folder=str(tmp_path / "hf"))
