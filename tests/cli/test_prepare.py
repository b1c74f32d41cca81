"""`megabatch prepare`: what it makes and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megabatch.cli import command

RECIPE = """
from megabatch import Batch, Data, Model, Parallel, Recipe, Resources, Training


def recipe() -> Recipe:
    return Recipe(
        name="small",
        task="sft",
        model=Model(model_type="qwen3", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
                    num_query_groups=2, kv_channels=8, padded_vocab_size=304, max_position_embeddings=256,
                    torch_dtype="float32"),
        data=Data(dataset=["example:arithmetic#20"], max_length=256),
        batch=Batch(global_batch_size=8),
        training=Training(max_epochs=3),
        parallel=Parallel(distributed_backend="gloo"),
        resources=Resources(gpus_per_node=0, tasks_per_node=1),
    )
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def test_it_makes_the_cache_and_says_how_long_the_run_is(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGABATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert command.main(["prepare", str(recipe_file)]) == 0
    said = capfd.readouterr().out
    assert "7 steps; an epoch draws all 20 samples" in said  # 20 x 3 // 8
    assert "the last epoch ends 4 samples early" in said
    [made] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert str(made) in said
    assert json.loads((made / "meta.json").read_text())["samples"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "recipe.py"], "no run directory"
    assert command.main(["prepare", str(recipe_file), "--global_batch_size", "32"]) == 2
    assert "is more than the 20 training items" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "the run would not find the cache: set MEGABATCH_CACHE"),
        (["--submit"], "--submit is not for preparing"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--max_epoch", "3"], "max_epochs"),
    ],
)
def test_what_it_refuses(
    recipe_file: Path,
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MEGABATCH_CACHE", raising=False)
    assert command.main(["prepare", str(recipe_file), *flags]) == 2
    assert said in capfd.readouterr().err


def test_the_command_line_knows_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megabatch.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "prepare" in done.stdout
