from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.slurm.snapshot import take_snapshot


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package one of whose folders is a link, like ours."""
    package = tmp_path / "src" / "megabatch"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__pycache__" / "x.pyc").write_text("")
    (tmp_path / "src" / "linked").mkdir()
    (tmp_path / "src" / "linked" / "module.py").write_text("VALUE = 1\n")
    (package / "linked").symlink_to("../linked")
    return package


def test_it_holds_plain_files_and_the_recipe(package: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.py"
    recipe.write_text("pass\n")
    snapshot = take_snapshot(tmp_path / "store", recipe=recipe, package=package)
    files = sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    assert files == ["megabatch/__init__.py", "megabatch/linked/module.py", "recipe/my recipe.py"]
    assert not any(path.is_symlink() for path in snapshot.rglob("*"))


def test_unchanged_code_is_the_same_folder_and_changed_code_another(package: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = take_snapshot(store, package=package)
    (package / "__pycache__" / "y.pyc").write_text("")
    assert take_snapshot(store, package=package) == first
    (tmp_path / "src" / "linked" / "module.py").write_text("VALUE = 2\n")
    second = take_snapshot(store, package=package)
    assert second != first
    assert (first / "megabatch" / "linked" / "module.py").read_text() == "VALUE = 1\n"
    assert sorted(store.iterdir()) == sorted([first, second])


def test_many_at_once_publish_one(package: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: take_snapshot(tmp_path / "store", package=package), range(16)))
    assert found == set((tmp_path / "store").iterdir())
    assert len(found) == 1


def test_the_real_package_runs_from_its_snapshot(tmp_path: Path) -> None:
    snapshot = take_snapshot(tmp_path)
    code = "import megabatch.slurm.render as r, megabatch.converters; print(r.__file__)"
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": str(snapshot)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(snapshot / "megabatch" / "slurm" / "render.py"), done.stderr


def test_a_store_that_cannot_be_written_is_an_error(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"cannot store the code snapshot in .*file"):
        take_snapshot(tmp_path / "file", package=package)
    assert (tmp_path / "file").read_text() == ""
