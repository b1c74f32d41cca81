"""Checkpoints as other programs leave them: folders with tracker files, runs of ours, keys in other spellings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.to_hf import find_reference, to_hf
from megabatch.converters.to_mcore import to_mcore
from megabatch.converters.torch_dist.find import find_checkpoint
from megabatch.converters.torch_dist.folder import TorchDistFolder
from megabatch.converters.torch_dist.metadata import dump_metadata
from megabatch.errors import ConversionError

Saved = Callable[[str], Path]


def layout(folder: Path, *files: str) -> Path:
    for name in files:
        path, _, text = name.partition("=")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([".metadata"], "."),
        (["mcore/.metadata", "hf/config.json"], "mcore"),
        (["latest_checkpointed_iteration.txt=release", "release/.metadata", "iter_0000002/.metadata"], "release"),
        (["latest_checkpointed_iteration.txt=20\n", "iter_0000020/.metadata", "iter_30/.metadata"], "iter_0000020"),
        (["latest=step_00000006\n", "step_00000006/mcore/.metadata", "step_00000003/mcore/.metadata"],
         "step_00000006/mcore"),
        (["run.json={}", "checkpoints/latest=step_00000006\n", "checkpoints/step_00000006/mcore/.metadata"],
         "checkpoints/step_00000006/mcore"),
    ],
)  # fmt: skip
def test_the_newest_checkpoint_is_found(files: list[str], found: str, tmp_path: Path) -> None:
    assert find_checkpoint(layout(tmp_path, *files)) == tmp_path / found


@pytest.mark.parametrize("files", [["a"], ["latest=../other"], ["latest_checkpointed_iteration.txt=../x"], []])
def test_what_is_there_instead_is_said(files: list[str], tmp_path: Path) -> None:
    layout(tmp_path / "c", *files, ".x")
    layout(tmp_path / "other", ".metadata")
    with pytest.raises(ConversionError, match=r"no torch_dist checkpoint .* in it; it has \.x"):
        find_checkpoint(tmp_path / "c")
    with pytest.raises(ConversionError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("config", ["config.json", "checkpoints/step_00000006/hf/config.json", "model/config.json"])
def test_the_folder_with_config_json_is_found_in_a_run(config: str, tmp_path: Path) -> None:
    checkpoint = layout(tmp_path, "checkpoints/step_00000006/mcore/.metadata") / "checkpoints/step_00000006/mcore"
    with pytest.raises(ConversionError, match=r"there is no config\.json beside .*--model"):
        find_reference(tmp_path, checkpoint)
    layout(tmp_path, config)
    assert find_reference(tmp_path, checkpoint) == (tmp_path / config).parent


def test_what_we_make_has_a_tracker_file_and_side_files(saved: Saved, tmp_path: Path) -> None:
    convert(ConversionRequest(to_mcore=True, model=saved("qwen3-moe")), output_dir=tmp_path / "mcore")
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text() == "release"
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore"), output_dir=tmp_path / "hf")
    shutil.rmtree(tmp_path / "mcore" / "release")
    for name in ("config.json", "generation_config.json"):
        expected = (saved("qwen3-moe") / name).read_bytes()
        assert (tmp_path / "mcore" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes() == expected


SPELLINGS = {
    "a wrapper": lambda key: f"module.{key}",
    "two wrappers": lambda key: f"model.module.{key}",
    "local layers": lambda key: key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-mixed", "llama-tied-biases"])
def test_other_spellings_are_read(spelling: str, name: str, saved: Saved, tmp_path: Path) -> None:
    to_mcore(saved(name), tmp_path / "mcore")
    folder = TorchDistFolder(tmp_path / "mcore")
    for key, entry in folder.entries.items():
        entry.dtype = folder.dtype(key)
    renamed = {SPELLINGS[spelling](key): entry for key, entry in folder.entries.items()}
    assert renamed.keys() != folder.entries.keys() or name == "llama-tied-biases"
    (tmp_path / "mcore" / ".metadata").write_bytes(dump_metadata(renamed, [], save_id="x"))
    to_hf(tmp_path / "mcore", saved(name), tmp_path / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (saved(name), tmp_path / "hf"))
    assert {key: value.tolist() for key, value in before.items()} == {k: v.tolist() for k, v in after.items()}
    assert sorted(os.listdir(tmp_path / "hf")) == sorted([*os.listdir(saved(name)), "megabatch-manifest.json"])
