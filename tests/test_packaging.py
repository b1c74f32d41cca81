"""The wheel: one installed name with every room inside, and a recipe that plans from it anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout: setuptools leaves files beside its sources."""
    source, target = tmp_path_factory.mktemp("source") / "megabatch", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("megabatch", "slurm", "converters"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", target, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(target.glob("megabatch-*.whl"))


def test_one_name_with_every_module(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"megabatch"}
    packed = {name for name in names if name.endswith(".py")}
    here = {
        f"megabatch/{room}{path.relative_to(ROOT / folder)}"
        for folder, room in (("megabatch", ""), ("slurm", "slurm/"), ("converters", "converters/"))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert packed == here
    assert "megabatch/py.typed" in names


def test_an_installed_wheel_plans_a_recipe(wheel: Path, tmp_path: Path) -> None:
    """Only the wheel is on the path: no torch, no submitit, not this checkout."""
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    recipe = tmp_path / "mine.py"
    shutil.copy(ROOT / "recipes" / "qwen3_moe_sft.py", recipe)
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"import sys, runpy; sys.path.insert(0, {str(installed)!r}); "
         f"sys.argv = ['mine.py', '--dry_run']; runpy.run_path({str(recipe)!r}, run_name='__main__')"],
        cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash") and "world 8 = tp 4 x pp 2" in done.stderr


SECOND_NAMES = {
    "slurm": ["-c", "import slurm"],
    "slurm.render": ["-c", "import slurm.render"],
    "converters.families": ["-c", "from converters.families import family_of"],
    "python -m slurm.cluster": ["-m", "slurm.cluster"],
    "python -m converters.command": ["-m", "converters.command", "--help"],
    "doctests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "converters/dtypes.py"],
}
"""Ways in which a program, a person or an editor takes the top-level folders for packages."""


@pytest.mark.parametrize("words", SECOND_NAMES.values(), ids=SECOND_NAMES)
def test_the_rooms_have_one_name(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    told = [line for line in (done.stdout + done.stderr).splitlines() if "second copy of every class" in line]
    room = "slurm" if "slurm" in str(words) else "converters"
    assert f"ImportError: import megabatch.{room}…: as {room}… it would be" in told[-1]


def test_style_knows_the_one_name() -> None:
    """What an editor shows while the import is typed."""
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "--stdin-filename=tests/x.py", "-"]
    typed = "from converters.families import family_of\nimport slurm.render\n"
    done = subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, text=True, check=False)
    assert "`slurm` is banned: import megabatch.slurm" in done.stdout
    assert "`converters` is banned: import megabatch.converters" in done.stdout


def test_constraints_fit_the_declared_ranges() -> None:
    """Every package of every extra is pinned, to a version inside its range."""
    import tomllib

    from megabatch.doctor.versions import supports

    pins = [line.split("#")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = [(name.lower().replace("_", "-"), rest.split(";")[0].strip()) for name, _, rest in
              (line.partition("==") for line in pins)]  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [line for line in (*project["dependencies"], *extras["train"], *extras["dev"]) if ">=" in line]
    assert len(wanted) > 15
    for line in wanted:
        name, _, rest = line.partition(">=")
        versions = [version for found, version in pinned if found == name]
        assert versions and all(supports(f">={rest}", version) for version in versions), line
