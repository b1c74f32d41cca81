"""Checkpoints as other programs leave them: what lies beside them, and keys in other spellings."""

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
from megabatch.converters.torch_dist.folder import TorchDistFolder
from megabatch.converters.torch_dist.metadata import dump_metadata
from megabatch.errors import ConversionError

Saved = Callable[[str], Path]


@pytest.mark.parametrize("config", ["config.json", "checkpoints/step_00000006/hf/config.json", "model/config.json"])
def test_the_folder_with_config_json_is_found_in_a_run(config: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000006" / "mcore"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ConversionError, match=r"there is no config\.json beside .*--model"):
        find_reference(tmp_path, checkpoint)
    (tmp_path / config).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / config).touch()
    assert find_reference(tmp_path, checkpoint) == (tmp_path / config).parent


def test_what_we_make_has_a_tracker_file_and_auxiliary_files(saved: Saved, tmp_path: Path) -> None:
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
