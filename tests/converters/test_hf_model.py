"""Opening a folder as a model, as the trainer and the converter do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megabatch.converters.hf_model import open_hf_model
from megabatch.errors import ConversionError

Saved = Callable[[str], Path]


def test_a_saved_model_opens(saved: Saved, case: str) -> None:
    model = open_hf_model(saved(case))
    assert model.config["model_type"] == model.family.name == model.shape.model_type
    assert not model.ignored


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_tied_output_layer_in_the_file(change: float, saved: Saved, tmp_path: Path) -> None:
    shutil.copy(saved("qwen2-tied") / "config.json", tmp_path)
    arrays = load_file(saved("qwen2-tied") / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + np.float32(change)
    save_file(arrays, tmp_path / "model.safetensors")
    if not change:
        assert list(open_hf_model(tmp_path).ignored) == ["lm_head.weight"]
        return
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_hf_model(tmp_path)
    assert open_hf_model(tmp_path, compare_duplicates=False).ignored


def test_config_and_weights_must_agree(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("qwen3"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConversionError, match=r"model\.layers\.2\..* is missing"):
        open_hf_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json: config is not valid JSON"):
        open_hf_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config\.json: cannot be read: No such file"):
        open_hf_model(tmp_path)
