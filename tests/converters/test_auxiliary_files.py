"""What travels with the weights, and what does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megabatch.converters.auxiliary_files import carry_over
from megabatch.errors import ConversionError

CARRIED = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "modeling_custom.py", "qwen.tiktoken", "LICENSE", "additional_chat_templates/tools.jinja",
    "README.md",
]  # fmt: skip
LEFT = [
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "tokenizer.bin", "consolidated.00.pth", "training_args.bin", "original/params.json", ".gitattributes",
]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name in CARRIED + LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_everything_but_the_weights_is_carried_over(source: Path, tmp_path: Path) -> None:
    carry_over(source, tmp_path / "out")
    assert _files(tmp_path / "out") == sorted(CARRIED)
    assert all((tmp_path / "out" / name).read_text() == name for name in CARRIED)


def test_files_that_the_caller_writes_are_left_alone(source: Path, tmp_path: Path) -> None:
    carry_over(source, tmp_path / "out", skip=["config.json"])
    assert _files(tmp_path / "out") == sorted(set(CARRIED) - {"config.json"})


def test_links_of_a_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to(source / "config.json")
    carry_over(snapshot, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert (tmp_path / "out" / "config.json").read_text() == "config.json"


def test_a_file_that_cannot_be_copied_is_named_and_nothing_is_half_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "merges.txt").mkdir(parents=True)
    with pytest.raises(ConversionError, match=r"merges\.txt.*cannot be carried over"):
        carry_over(source, out)
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
