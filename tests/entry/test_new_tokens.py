"""`model.new_special_tokens` before a run is queued: the vocabulary that is planned, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabatch import Bridge, Checkpoint, Gkd, Model, Recipe, Rlhf, Tuner
from megabatch.config.rules.check import check
from megabatch.entry.input_checks import missing_inputs
from megabatch.entry.model import find_model
from megabatch.entry.paths import absolute_paths

NEW_MODEL: dict[str, Any] = {
    "model_type": "llama", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def tokens(recipe: Recipe, model_folder: Path) -> Recipe:
    """A recipe with two new tokens, and a tokenizer of 31 tokens for its model of 32 rows."""
    made = {"model": {"vocab": {chr(97 + i): i for i in range(26)}}, "added_tokens": [
        {"id": 26 + i, "content": f"<{i}>", "special": True} for i in range(5)]}  # fmt: skip
    (model_folder / "tokenizer.json").write_text(json.dumps(made))
    return _with(recipe, "<x>", "<y>")


def _with(recipe: Recipe, *tokens: str, **fields: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, new_special_tokens=tokens, **fields))


def _faults(recipe: Recipe) -> str:
    model = find_model(recipe)
    return "\n".join(map(str, [*check(recipe, model.shape), *missing_inputs(recipe, model)]))


def test_the_model_is_planned_with_its_new_rows(tokens: Recipe) -> None:
    one, two = find_model(_with(tokens, "<x>")).shape, find_model(tokens).shape
    assert one is not None and two is not None
    assert (one.vocab_size, two.vocab_size, two.hf_config["vocab_size"]) == (32, 33, 33), "one row was there"
    assert _faults(tokens) == ""


def test_a_run_keeps_the_tokens_of_a_file(tokens: Recipe, tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<x>\n<y>\n")
    named = _with(tokens, str(tmp_path / "tokens.txt"))
    assert absolute_paths(named).model.new_special_tokens == ("<x>", "<y>")
    assert find_model(named).shape == find_model(tokens).shape


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (("<x>", "<x>"), "model.new_special_tokens: '<x>' is given twice; give each token once"),
        (("<3>",), "'<3>' is a token of"),
        (("none.txt",), "none.txt cannot be read (No such file or directory)"),
    ],
)
def test_faulty_tokens_are_one_error(tokens: Recipe, given: tuple[str, ...], fault: str) -> None:
    found = _faults(_with(tokens, *given))
    assert fault in found and len(found.splitlines()) == 1, found


def test_a_model_of_the_hub_needs_its_tokenizer_here(tokens: Recipe) -> None:
    found = _faults(_with(tokens, "<x>", model="Qwen/Qwen3-30B-A3B-Instruct-2507"))
    assert "needs the tokenizer of Qwen/Qwen3-30B-A3B-Instruct-2507 on this machine" in found
    assert "run first: modelscope download --model Qwen/Qwen3-30B-A3B-Instruct-2507" in found


def test_a_new_model_must_have_rows_for_them(tokens: Recipe, model_folder: Path) -> None:
    made = replace(tokens, model=Model(**NEW_MODEL, padded_vocab_size=300, new_special_tokens=["<x>"]))
    assert _faults(made) == ""
    assert "'<|im_end|>' is a token of every new tokenizer" in _faults(_with(made, "<|im_end|>"))
    small = replace(made, model=replace(made.model, tokenizer=str(model_folder), padded_vocab_size=31))
    assert "model.padded_vocab_size=31 is too few for the 32 tokens" in _faults(small)


def test_rows_that_nothing_trains_are_refused(tokens: Recipe, model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    assert "set tuner.tuner_type='full'" in _faults(replace(tokens, tuner=Tuner(tuner_type="lora")))
    (model_folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    alone = replace(tokens, tuner=Tuner(tuner_type="lora"))
    assert (
        "word_embeddings is frozen, so its new rows learn nothing; add 'word_embeddings' to tuner.modules_to_save or "
        "tuner.target_modules" in _faults(alone)
    )
    both = replace(tokens, tuner=Tuner(tuner_type="lora", target_modules=["all-linear", "all-embedding"]))
    assert "output_layer is frozen" in _faults(both)
    adapted = replace(both, tuner=replace(both.tuner, target_modules=["all-embedding", "lm_head"]))
    assert _faults(adapted) == ""
    folder = replace(adapted, bridge=Bridge(merge_lora=False))
    assert "add 'word_embeddings' to tuner.modules_to_save, the rows that a PEFT folder holds" in _faults(folder)
    whole = replace(folder, tuner=Tuner(tuner_type="lora", modules_to_save=["embed_tokens", "lm_head"]))
    assert _faults(whole) == ""
    frozen = replace(tokens, tuner=Tuner(freeze_parameters=["model.embed_tokens"]))
    assert "add 'embedding.word_embeddings' to tuner.trainable_parameters" in _faults(frozen)


def test_a_checkpoint_to_load_has_its_own_embedding(tokens: Recipe, tmp_path: Path) -> None:
    found = _faults(replace(tokens, checkpoint=Checkpoint(load=str(tmp_path / "step"), finetune=True)))
    assert f"checkpoint.load={str(tmp_path / 'step')!r} has an embedding of its own" in found


def test_a_teacher_that_cannot_read_them(tokens: Recipe, model_folder: Path) -> None:
    gkd = Gkd(teacher_model=str(model_folder), gkd_logits_topk=4)
    distilled = replace(tokens, task="rlhf", rlhf=Rlhf(rlhf_type="gkd"), gkd=gkd)
    rule = "has 32 tokens, and the student's tokenizer with model.new_special_tokens 33"
    assert rule in _faults(distilled)
    assert "new_special_tokens" not in _faults(_with(distilled, "<x>")), "one row was there"
