"""`--test_convert_precision`: passes for a good conversion in each direction, and fails for one wrong tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.command import main
from megabatch.converters.conversion import make_plan
from megabatch.trainer.precision import THRESHOLDS, Difference

COMMAND = [sys.executable, "-m", "megabatch.converters.command", "--test_convert_precision"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_there_and_back(saved: Callable[[str], Path], tmp_path: Path) -> None:
    done = run("--to_mcore", "--model", saved("qwen3-moe"), "--output_dir", tmp_path / "mcore")
    assert done.returncode == 0, done.stderr
    for name in ("layer 0", "layer 1", "logits", "equal to rounding: float32 allows"):
        assert name in done.stdout
    back = ("--to_hf", "--mcore_model", tmp_path / "mcore", "--output_dir", tmp_path / "hf")
    done = run(*back, "--torch_dtype", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_wrong_tensor_fails(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A checkpoint that loads, and whose value heads of one layer are exchanged."""
    convert(ConversionRequest(to_mcore=True, model=saved("qwen3-moe")), output_dir=tmp_path / "mcore")
    plan = make_plan(ConversionRequest(to_mcore=True, model=saved("qwen3-moe")))
    qkv = next(tensor for tensor in plan.tensors if "1.self_attention.linear_qkv.weight" in tensor.name)
    path = tmp_path / "mcore" / plan.files[qkv.file].name
    raw = bytearray(path.read_bytes())
    half = qkv.data_bytes // 2
    first, second = qkv.data_offset, qkv.data_offset + half
    raw[first : second + half] = raw[second : second + half] + raw[first:second]
    path.write_bytes(raw)
    done = run("--to_mcore", "--model", saved("qwen3-moe"), "--output_dir", tmp_path / "mcore")
    assert done.returncode == 1
    assert "NOT EQUAL" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "layer" in line or "logits" in line]
    assert ["too large" in line for line in lines[:2]] == [False, True]
    assert "do not compute the same" in done.stderr


def test_other_dtypes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--to_mcore", "--model", "m", "--output_dir", "o", "--test_convert_precision"]
    assert main([*flags, "--test_convert_dtype", "int8"]) == 2
    assert "must be float32 or bfloat16" in capsys.readouterr().err


def test_models_that_the_trainer_has_not_built_are_refused_before_anything_is_written(
    saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((saved("llama") / "config.json").read_text())
    config |= {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--to_mcore", "--model", str(tmp_path), "--output_dir", str(tmp_path / "o"), "--test_convert_precision"]
    assert main(flags) == 1
    assert "the trainer does not support" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_nan_never_passes() -> None:
    nan = torch.tensor([1.0, float("nan")])
    for threshold in THRESHOLDS.values():
        assert not Difference.of(nan, torch.ones(2)).passes(threshold)
        assert Difference.of(torch.ones(2), torch.ones(2)).passes(threshold)
        assert not Difference.of(torch.ones(2) * 1.1, torch.ones(2)).passes(threshold)
