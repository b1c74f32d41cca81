"""`--layer_keys per_layer`: what megatron-core itself asks for where `moe_layer_freq` is a list, be it of ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import megabatch
from megabatch.converters import ConversionRequest, convert
from megabatch.converters.torch_dist.folder import TorchDistFolder

PROGRAM = Path(__file__).with_name("loaded_models.py")
ALONE = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-tied"])
def test_a_model_with_a_list_of_ones_loads_keys_of_single_layers(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    hf, stacked, per_layer = saved(name), tmp_path / "stacked", tmp_path / "per_layer"
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=stacked)
    convert(ConversionRequest(to_mcore=True, model=hf, layer_keys="per_layer"), output_dir=per_layer)
    environment = {**os.environ, **ALONE, "PYTHONPATH": str(Path(megabatch.__file__).parents[1])}
    command = [sys.executable, str(PROGRAM), str(hf), str(stacked / "release"), str(per_layer / "release")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = set(done.stdout.splitlines())
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in asked
    tensors = {key for key in asked if "_extra_state/" not in key}
    assert tensors == TorchDistFolder(per_layer / "release").entries.keys() and tensors < asked
