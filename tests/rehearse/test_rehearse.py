"""`megabatch rehearse`: says that recipes resume exactly, and notices when they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megabatch.config.layout import layout_of
from megabatch.config.new_model import declared_shape
from megabatch.rehearse.shrink import shrink

RECIPES = Path(__file__).parents[2] / "recipes"

FORGETS_THE_CURSOR = """
import sys
if "megabatch.trainer.main" in sys.orig_argv:
    from megabatch.data.schedule import Cursor
    from_json = Cursor.from_json
    Cursor.from_json = staticmethod(lambda value: from_json({**value, "offset": 0} if value else {}))
"""
"""A sitecustomize: runs begin their epoch anew wherever they are resumed, as a trainer does that saves no cursor."""


def rehearse(recipe: str, *flags: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-P", "-m", "megabatch.cli", "rehearse", str(RECIPES / recipe)]
    return subprocess.run(
        [*command, "--dir", str(folder / "runs"), "--steps", "12", *flags],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_a_recipe_that_resumes(tmp_path: Path) -> None:
    done = rehearse("quickstart.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal, bit for bit") == 3
    assert done.stdout.splitlines()[-1] == "quickstart: resumes bit for bit"


def test_a_resume_that_forgets_where_the_data_was(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FORGETS_THE_CURSOR)
    one_rank = ("--tasks_per_node", "1", "--expert_model_parallel_size", "1")  # what is forgotten knows no layout
    done = rehearse("quickstart.py", *one_rank, folder=tmp_path, path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "12 training steps: losses, gradient norms, tokens        first at step " in done.stdout
    assert "DOES NOT RESUME EXACTLY" in done.stdout


def test_flags_that_ask_for_something_else_are_refused(tmp_path: Path) -> None:
    done = rehearse("quickstart.py", "--submit", "--chain", "3", folder=tmp_path)
    assert done.returncode == 2
    for flag in ("--submit", "--chain"):
        assert f"  {flag} has no effect on a rehearsal" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        "gsm8k_sft",
        "gsm8k_lora",
        "pretrain",
        "qwen3_moe_sft",
        "qwen3_moe_lora",
        "qwen2_5_7b_sft",
        "long_context_sft",
    ],
)
def test_recipes_shrink_to_what_few_processes_train(name: str) -> None:
    from megabatch.cli.recipe_file import load_recipe
    from megabatch.entry.model import find_model

    recipe = load_recipe(RECIPES / f"{name}.py")()
    shape = find_model(recipe).shape
    assert shape is not None
    small = shrink(recipe, shape, steps=12, max_ranks=4)
    made = declared_shape(small.recipe)
    assert made is not None and small.recipe.resources.world_size <= 4
    layout = layout_of(small.recipe, made)
    assert layout is not None
    assert (made.model_type, made.num_experts is None) == (shape.model_type, shape.num_experts is None)
    whole = layout_of(recipe, shape)
    assert whole is not None
    # a size above 1 stays above 1, or is named
    fields = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "ep": "expert_model"}
    for size, field in fields.items():
        smaller = getattr(layout, size) != getattr(whole, size)
        assert smaller == any(f"parallel.{field}_parallel_size=" in note for note in small.left_out)
