"""A recipe file that cannot be built is explained by its line, in one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megabatch import Recipe
from megabatch.cli.command import main
from megabatch.cli.recipe_command import run
from megabatch.errors import ConfigError

FIELD = 'from megabatch import Parallel, Recipe\ndef recipe():\n    return Recipe(name="x", parallel=Parallel(tp=2))\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def recipe(:\n", "r.py:1: invalid syntax"),
        ("\nimport not_there\ndef recipe(): ...\n", "r.py:2: ModuleNotFoundError: No module named 'not_there'"),
        ("def recipe():\n    raise ValueError('why')\n", "r.py:2: ValueError: why"),
        ("import json\ndef recipe():\n    json.loads('{')\n", "r.py:3: JSONDecodeError: "),
        ("def recipe():\n    pass\n", "r.py: recipe() returns None; it must return a Recipe or a Chain"),
        (FIELD, "r.py:3: Parallel(tp=…) is not a field of Parallel"),
        ("x = 1\0\n", "r.py: source code string cannot contain null bytes"),
        ("import sys\nsys.exit(0)\n", "r.py:2: SystemExit: 0; it may not end the program"),
        ("def recipe():\n    raise SystemExit('no GPU')\n", "r.py:2: SystemExit: no GPU; it may not end the program"),
        ("def recipe(size):\n    pass\n", "r.py: recipe() is called without arguments, but needs size"),
        ("import os\nos.chdir('/')\ndef recipe(): ...\n", "r.py changes the current folder to /, so that relative"),
        ("import os\ndef recipe():\n    os.chdir('/')\n", "r.py changes the current folder to /, so that relative"),
        ("def recipe():\n    assert 1 == 2\n", "r.py:2: AssertionError: assert 1 == 2"),
    ],
)
def test_what_a_recipe_file_does_wrong(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text(text)
    assert main(["plan", "r.py"]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown


def test_a_program_that_went_elsewhere_before_its_main(tmp_path: Path) -> None:
    """Started by an absolute path, which says nothing of where the command was started."""
    text = (
        "import os\nos.chdir('/')\nfrom megabatch import Recipe, main\n"
        "def recipe():\n    return Recipe(name='x', task='sft')\nmain(recipe)\n"
    )
    (tmp_path / "r.py").write_text(text)
    words = [sys.executable, str(tmp_path / "r.py"), "--dry_run"]
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"PWD": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "r.py changes the current folder to /, so that relative" in done.stderr


def test_a_recipe_may_import_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_the_recipe.py").write_text("NAME = 'ours'\n")
    text = "from beside_the_recipe import NAME\ndef recipe():\n    raise ValueError(NAME)\n"
    (tmp_path / "r.py").write_text(text)
    assert main(["plan", str(tmp_path / "r.py")]) == 2
    assert "r.py:3: ValueError: ours" in capsys.readouterr().err


def test_main_takes_the_function() -> None:
    with pytest.raises(ConfigError, match=r"main\(recipe\)"):
        run(Recipe(name="x", task="sft"), ["--dry_run"])  # type: ignore[arg-type]


def test_a_folder_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
