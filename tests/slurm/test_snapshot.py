from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.script.code import own_code
from megabatch.slurm.snapshot import Snapshot, read_snapshot, snapshot_of

LONG = "r" * 200 + ".py"


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


@pytest.fixture
def stored(package: Path, tmp_path: Path) -> Snapshot:
    snapshot = snapshot_of(tmp_path / "store", package=package)
    snapshot.store()
    return snapshot


@pytest.mark.parametrize("name", ["my recipe.py", LONG])
def test_it_holds_plain_files_and_the_recipe(package: Path, tmp_path: Path, name: str) -> None:
    recipe = tmp_path / name
    recipe.write_text("pass\n")
    snapshot = snapshot_of(tmp_path / "store", recipe=recipe, package=package)
    snapshot.store()
    with tarfile.open(snapshot.path) as archive:
        found = archive.getmembers()
    assert [one.name for one in found] == ["megabatch/__init__.py", "megabatch/linked/module.py", f"recipe/{name}"]
    assert all(one.isreg() and one.mode == 0o644 for one in found)
    assert read_snapshot(snapshot.path)[f"recipe/{name}"] == b"pass\n"


def test_its_name_is_the_digest_of_its_bytes(stored: Snapshot) -> None:
    assert stored.path.name == f"{hashlib.sha256(stored.path.read_bytes()).hexdigest()}.tar"


def test_unchanged_code_is_the_same_file_and_changed_code_another(
    package: Path, tmp_path: Path, stored: Snapshot
) -> None:
    before = stored.path.stat()
    (package / "__pycache__" / "y.pyc").write_text("")
    again = snapshot_of(tmp_path / "store", package=package)
    again.store()
    assert again.path == stored.path and os.path.samestat(before, stored.path.stat()), "not written a second time"
    (tmp_path / "src" / "linked" / "module.py").write_text("VALUE = 2\n")
    second = snapshot_of(tmp_path / "store", package=package)
    second.store()
    assert read_snapshot(stored.path)["megabatch/linked/module.py"] == b"VALUE = 1\n"
    assert sorted((tmp_path / "store").iterdir()) == sorted([stored.path, second.path])


def test_many_at_once_publish_one(package: Path, tmp_path: Path) -> None:
    def store(_: int) -> Path:
        snapshot = snapshot_of(tmp_path / "store", package=package)
        snapshot.store()
        return snapshot.path

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(store, range(16)))
    assert found == set((tmp_path / "store").iterdir()) and len(found) == 1


def test_what_somebody_planted_by_its_name_is_replaced(stored: Snapshot, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for plant in (
        lambda: stored.path.write_bytes(stored.content[:-1] + b"x"),
        lambda: (elsewhere.write_bytes(b"evil"), stored.path.unlink(), stored.path.symlink_to(elsewhere)),
        lambda: (stored.path.unlink(), os.mkfifo(stored.path)),
    ):
        plant()
        stored.store()
        assert stored.path.read_bytes() == stored.content and not stored.path.is_symlink()
    assert elsewhere.read_bytes() == b"evil"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_the_right_content_of_another_user_is_replaced(stored: Snapshot) -> None:
    os.chown(stored.path, 12345, -1)
    stored.store()
    assert stored.path.stat().st_uid == os.getuid()


def test_others_cannot_write_it_whatever_the_umask(package: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        snapshot = snapshot_of(tmp_path / "store", package=package)
        snapshot.store()
    finally:
        os.umask(before)
    assert snapshot.path.stat().st_mode & 0o777 == 0o644
    assert snapshot.path.parent.stat().st_mode & 0o777 == 0o755


def test_a_store_that_cannot_be_written_is_an_error(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"cannot store the code snapshot in .*file"):
        snapshot_of(tmp_path / "file", package=package).store()
    assert (tmp_path / "file").read_text() == ""


def used(snapshot: Snapshot, cache: Path, script: str) -> subprocess.CompletedProcess[str]:
    """What a task does with a job's code."""
    job = JobSpec(name="j", run_directory=Path("/j"), snapshot=snapshot.path)
    begin = "\n".join(own_code(job, replace(ClusterProfile(), local_cache=str(cache))))
    text = f"{begin}\nbash -c \"$own_code\"$'\\n'{script!r}"
    environment = {"PATH": os.environ["PATH"], "MEGABATCH_CODE": str(snapshot.path)}
    return subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=False)


def test_the_real_package_runs_from_its_snapshot(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "store")
    snapshot.store()
    program = "import megabatch.slurm.render as r, megabatch.converters; print(r.__file__)"
    script = f'use_code && cd / && {sys.executable} -P -c "{program}"'
    done = used(snapshot, tmp_path, script)
    code = tmp_path / f"megabatch-{os.getuid()}" / "code" / snapshot.path.name[:16]
    assert done.stdout.strip() == str(code / "megabatch" / "slurm" / "render.py"), done.stderr
    assert (code.parent.parent.stat().st_mode & 0o777) == 0o700


def test_a_task_refuses_what_is_not_the_code_of_its_job(stored: Snapshot, tmp_path: Path) -> None:
    stored.path.write_bytes(stored.content.replace(b"VALUE = 1", b"VALUE = 2"))
    done = used(stored, tmp_path, "use_code; exit $?")
    assert done.returncode == ExitCode.CONFIG
    assert f"{stored.path} is not the code that was submitted" in done.stderr
    stored.path.unlink()
    assert used(stored, tmp_path, "use_code; exit $?").returncode == ExitCode.CONFIG
    assert not list(tmp_path.rglob("module.py*"))[1:], "nothing of it was unpacked"


def test_what_cleaners_took_from_a_node_comes_back(stored: Snapshot, tmp_path: Path) -> None:
    show = 'use_code && cat "$PYTHONPATH/megabatch/linked/module.py"'
    assert used(stored, tmp_path, show).stdout == "VALUE = 1\n"
    code = tmp_path / f"megabatch-{os.getuid()}" / "code" / stored.path.name[:16]
    (code / "megabatch" / "__pycache__").mkdir()
    (code / "megabatch" / "__pycache__" / "x.pyc").write_text("")
    (code / "megabatch" / "linked" / "module.py").unlink()
    assert used(stored, tmp_path, show).stdout == "VALUE = 1\n"
    stored.path.unlink()
    assert used(stored, tmp_path, show).stdout == "VALUE = 1\n", "a node that has the code reads nothing more"
    assert {path.name for path in code.parent.iterdir()} == {code.name, ".lock"}


def unpacked(stored: Snapshot, cache: Path) -> Path:
    return cache / f"megabatch-{os.getuid()}" / "code" / stored.path.name[:16]


def inodes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in [folder, *folder.rglob("*")] if path.name != ".files"}


def test_what_is_missing_is_put_back_beneath_tasks_that_run(stored: Snapshot, tmp_path: Path) -> None:
    """Nothing that is there is moved, replaced or taken away for a moment: every inode stays what it was."""
    assert used(stored, tmp_path, "use_code").returncode == 0
    code = unpacked(stored, tmp_path)
    before = inodes(code)
    missing = code / "megabatch" / "linked" / "module.py"
    for damage in (missing.unlink, lambda: shutil.rmtree(missing.parent), (code / ".files").unlink):
        damage()
        kept = inodes(code)
        assert used(stored, tmp_path, "use_code").returncode == 0
        after = inodes(code)
        assert after.keys() == before.keys() and {path: after[path] for path in kept} == kept
        assert missing.read_text() == "VALUE = 1\n"
    missing.write_text("VALUE = 1")
    (code / ".files").unlink()
    assert used(stored, tmp_path, "use_code").returncode == 0
    assert missing.read_text() == "VALUE = 1\n", "one that was cut is replaced whole"


def test_a_task_that_reads_while_others_mend_misses_only_what_was_taken(stored: Snapshot, tmp_path: Path) -> None:
    """Two jobs at once: one reads every file over and over, one finds the folder incomplete again and again."""
    assert used(stored, tmp_path, "use_code").returncode == 0
    code = unpacked(stored, tmp_path)
    victim = code / "megabatch" / "linked" / "module.py"
    others = [path for path in code.rglob("*") if path.is_file() and path != victim]
    assert len(others) >= 2
    words = " ".join(shlex.quote(str(path)) for path in others)
    reading = f"use_code; echo on; until [ -e {tmp_path}/end ]; do cat -- {words} >/dev/null || exit 9; done"
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(used, stored, tmp_path, reading)
        for _ in range(10):
            victim.unlink()
            assert used(stored, tmp_path, "use_code").returncode == 0
            assert victim.exists()
        (tmp_path / "end").write_text("")
        done = reader.result()
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def aged(path: Path, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(path, (then, then))


def test_leftovers_go_after_a_day_and_unused_code_after_a_month(stored: Snapshot, tmp_path: Path) -> None:
    assert used(stored, tmp_path, "use_code").returncode == 0
    code = unpacked(stored, tmp_path)
    for name, days in (("old", 1.1), ("young", 0.9)):
        (code.parent / f".new.{name}").mkdir()
        (code.parent / f".new.{name}" / "tar").write_text("")
        aged(code.parent / f".new.{name}", days)
    for name, days in (("forgotten", 31.1), ("used", 29.0), ("running", 99.0)):
        (code.parent / name).mkdir()
        (code.parent / name / ".files").write_bytes(b"./x\0")
        aged(code.parent / name / ".files", days)
    aged(code / ".files", 99.0)
    running = os.open(code.parent / "running", os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_SH)
    try:
        assert used(stored, tmp_path, "SLURM_LOCALID=1 use_code").returncode == 0
        assert (code.parent / "forgotten").exists(), "one task of a node looks"
        held = 'use_code; if flock -nx "$PYTHONPATH" true; then exit 9; fi'
        assert used(stored, tmp_path, held).returncode == 0, "a task holds its code"
    finally:
        os.close(running)
    names = {path.name for path in code.parent.iterdir()}
    assert names == {code.name, ".lock", ".new.young", "used", "running"}
    assert time.time() - (code / ".files").stat().st_mtime < 3600
    assert used(stored, tmp_path, "use_code").returncode == 0
    assert not (code.parent / "running").exists(), "nor is anything kept once its last task is gone"


def test_many_tasks_of_a_node_unpack_it_once(stored: Snapshot, tmp_path: Path) -> None:
    show = 'use_code && cat "$PYTHONPATH/megabatch/linked/module.py"'
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda _: used(stored, tmp_path, show), range(8)))
    assert [(one.stdout, one.stderr) for one in said] == [("VALUE = 1\n", "")] * 8
