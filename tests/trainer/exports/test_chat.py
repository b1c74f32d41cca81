"""What an exported folder's tokenizer renders, read back by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.trainer.exports.chat import ChatExport

OTHER = "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with ChatML's tokens and a BOS before every text, without a template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train_bpe(["two plus two", "is four"] * 4, vocab_size=300, out_dir=folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    made["post_processor"] = {
        "type": "TemplateProcessing", "special_tokens": {"<|endoftext|>": bos},
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(made))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|endoftext|>"}))
    return folder


def _with_template(source: Path, target: Path, *, where: str) -> Path:
    """A copy of a tokenizer with a template of its own, in one of the places that it may stand in."""
    shutil.copytree(source, target)
    if where in ("file", "both"):
        (target / "chat_template.jinja").write_text(OTHER)
    if where in ("config", "both"):
        config = json.loads((target / "tokenizer_config.json").read_text())
        (target / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": OTHER}))
    if where == "named":
        config = json.loads((target / "tokenizer_config.json").read_text())
        named = [{"name": "default", "template": OTHER}, {"name": "tool_use", "template": "{{ tools }}" + OTHER}]
        (target / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    return target


def _config_folder(tmp_path: Path, **generation: Any) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
    (folder / "tokenizer.json").write_text("another tokenizer, which must not be carried over")
    (folder / "chat_template.jinja").write_text("another template")
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _exported(tmp_path: Path, tokenizer: Path, template: str | None, **generation: Any) -> Path:
    out = tmp_path / "hf"
    out.mkdir()
    ChatExport(tokenizer, template, has_turns=True).write(_config_folder(tmp_path, **generation), out)
    return out


@pytest.mark.parametrize("template", [None, "chatml", "plain"])
@pytest.mark.parametrize("where", ["nowhere", "file", "config", "both", "named"])
@pytest.mark.parametrize("has_tools", [False, True])
def test_the_export_renders_what_was_trained(
    tmp_path: Path, plain_folder: Path, template: str | None, where: str, has_tools: bool
) -> None:
    folder = _with_template(plain_folder, tmp_path / "tokenizer", where=where)
    own = where != "nowhere" and template is None
    if own and has_tools and where != "named":
        pytest.skip("this template reads no tools, and refuses them")
    fields = {"messages": MESSAGES, **({"tools": TOOLS} if has_tools else {})}
    (sample,) = Encoder(Encoding(tokenizer=folder, template=template)).encode([Row(Origin("f", 1), fields)]).samples
    loaded = AutoTokenizer.from_pretrained(_exported(tmp_path, folder, template))
    tools = TOOLS if has_tools else None
    rendered = loaded.apply_chat_template(MESSAGES, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    assert rendered == sample.ids.tolist()
    text = loaded.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
    assert rendered == loaded(text, add_special_tokens=False)["input_ids"]
    assert rendered.count(0) == 1  # exactly one BOS
    assert rendered[0] == 0 or (own and has_tools)


def test_both_places_hold_the_template(tmp_path: Path, plain_folder: Path) -> None:
    out = _exported(tmp_path, plain_folder, "plain")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (out / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").unlink()  # as an older transformers reads it
    assert AutoTokenizer.from_pretrained(out).chat_template == config["chat_template"]


def test_a_tokenizers_own_template_is_copied_as_it_is(tmp_path: Path, plain_folder: Path) -> None:
    folder = _with_template(plain_folder, tmp_path / "tokenizer", where="config")
    out = _exported(tmp_path, folder, None)
    assert not (out / "chat_template.jinja").exists()  # nor that of the model's folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, [2, 0]),
        ({"eos_token_id": 0, "temperature": 0.6}, [2, 0]),
        ({"eos_token_id": [0, 7]}, [2, 0, 7]),
        ({"eos_token_id": [7, 2]}, [7, 2]),
    ],
)
def test_generation_stops_at_the_end_of_a_turn(
    tmp_path: Path, plain_folder: Path, generation: dict[str, Any], expected: list[int]
) -> None:
    out = _exported(tmp_path, plain_folder, "chatml", **generation)
    read = GenerationConfig.from_pretrained(out)
    assert read.eos_token_id == expected
    assert read.temperature == generation.get("temperature", read.temperature)


def test_pretraining_exports_the_files_as_they_are(tmp_path: Path, plain_folder: Path) -> None:
    out = tmp_path / "hf"
    out.mkdir()
    ChatExport(plain_folder, None, has_turns=False).write(_config_folder(tmp_path), out)
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (out / "tokenizer.json").read_bytes() == (plain_folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("template", [None, "plain", "chatml"])
def test_supervised_and_pretraining_samples_begin_with_the_same_bos(plain_folder: Path, template: str | None) -> None:
    row = Row(Origin("f", 1), {"query": "two", "response": "four"})
    for rows in ("documents", "conversations"):
        (sample,) = Encoder(Encoding(tokenizer=plain_folder, rows=rows, template=template)).encode([row]).samples
        assert sample.ids[0] == 0
        assert (sample.ids == 0).sum() == 1
