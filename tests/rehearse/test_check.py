"""`megabatch check`: says that a layout computes what one process computes, and notices when it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"

SOFTMAX_OF_ONE_RANK = """
import sys
if "megabatch.trainer.main" in sys.orig_argv:
    from megabatch.trainer.ops.vocab import VocabShard
    VocabShard.is_split = property(lambda self: False)
"""
"""A sitecustomize: under tensor parallelism each rank takes its own part of the vocabulary for the whole."""


def check(recipe: str, *flags: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-P", "-m", "megabatch.cli", "check", str(RECIPES / recipe)]
    return subprocess.run(
        [*command, "--dir", str(folder / "runs"), "--steps", "2", *flags],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize(
    ("recipe", "flags", "said"),
    [
        ("quickstart.py", (), ("(ep 2)",)),
        ("gsm8k_lora.py", (), ("(ep 2)",)),
        (
            "quickstart.py",
            (
                "--optimizer_cpu_offload",
                "true",
                "--torch_dtype",
                "bfloat16",
                "--use_precision_aware_optimizer",
                "true",
                "--main_grads_dtype",
                "bf16",
            ),
            ("(ep 2)", "optimizer.main_grads_dtype='bf16': 'fp32' here"),
        ),
        (
            "qwen2_5_7b_sft.py",
            (
                "--num_virtual_stages_per_pipeline_rank",
                "2",
                "--optimizer",
                "muon",
                "--use_distributed_optimizer",
                "false",
                "--muon_lr",
                "1e-3",
            ),
            ("(tp 2)", "optimizer.optimizer='muon': 'adam' here"),
        ),
    ],
)
def test_a_layout_that_computes_the_same(
    recipe: str, flags: tuple[str, ...], said: tuple[str, ...], tmp_path: Path
) -> None:
    done = check(recipe, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(words in done.stdout for words in said), done.stdout
    assert done.stdout.count("within") >= 3
    assert "gradients of" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(": computes what one process computes")


def test_a_layout_that_computes_something_else(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SOFTMAX_OF_ONE_RANK)
    flags = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true", "--expert_model_parallel_size", "1")
    done = check("quickstart.py", *flags, folder=tmp_path, path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT within 1e-05: step 1" in done.stdout
    assert "NOT within 1e-04: " in done.stdout, "the tensor with the largest difference is named"
    assert "DOES NOT COMPUTE THE SAME; both runs are in" in done.stdout
    assert (tmp_path / "runs" / "layout" / "metrics.jsonl").is_file()


def test_one_step_is_too_few(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "megabatch.cli", "check", str(RECIPES / "quickstart.py"), "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--steps must be at least 2" in done.stderr
