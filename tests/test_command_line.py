"""What every command line does with names, bytes and readers that it did not ask for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.py"
LONG = "a" * 300
MEGABATCH = [sys.executable, "-m", "megabatch.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def ended(words: list[str | bytes], cwd: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, check=False)


@pytest.mark.parametrize(
    "words",
    [
        *([*MEGABATCH, command, LONG] for command in ("status", "why", "resume", "cancel", "plan", "logs")),
        [*MEGABATCH, "sweep", "show", LONG],
        [*MEGABATCH, "doctor", "--cluster", f"{LONG}/x.toml"],
        *([sys.executable, str(RECIPE), action, "--run_dir", LONG] for action in ("--submit", "--local")),
        [sys.executable, str(RECIPE), "--dry_run", "--dataset", f"./{LONG}"],
        [sys.executable, str(RECIPE), "--dry_run", "--model", f"./{LONG}"],
        [sys.executable, str(RECIPE), "--dry_run", "--sweep", "lr=1,2", "--run_dir", LONG],
    ],
)
def test_a_name_that_is_too_long_is_one_line(words: list[str], tmp_path: Path) -> None:
    done = ended(list(words), tmp_path)
    said = done.stderr.decode()
    assert done.returncode in (1, 2) and "Traceback" not in said, said
    assert any("too long" in line or "no such file" in line.lower() for line in said.splitlines()), said


@pytest.mark.parametrize(
    "words",
    [
        [*MEGABATCH, "status"],
        [*MEGABATCH, "cancel"],
        *([sys.executable, str(RECIPE), a, "--run_dir"] for a in ("--submit", "--dry_run")),
    ],
)
def test_bytes_that_are_no_text_are_refused_by_name(words: list[str], tmp_path: Path) -> None:
    done = ended([*words, b"r\xff"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.decode() == "error: argument 'r\\udcff' holds bytes that are not UTF-8; rename it\n"
    assert not list(tmp_path.iterdir())


def test_a_current_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"r\xff")
    os.mkdir(folder)
    done = subprocess.run(
        [sys.executable, str(RECIPE), "--dry_run"], cwd=folder, capture_output=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 2 and b"error: current folder" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        *([*MEGABATCH, *command, "--help"] for command in ([], ["status"], ["plan"], ["sweep"])),
        [sys.executable, str(RECIPE), "--help"],
        [sys.executable, str(RECIPE), "--dry_run"],
    ],
)
def test_a_reader_that_leaves_early_sees_no_traceback(words: list[str], tmp_path: Path) -> None:
    """The pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, env=ENVIRONMENT, check=False)
    os.close(writing)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr, done.stderr.decode()


@pytest.mark.parametrize("words", [[sys.executable, str(RECIPE), "--dry_run"], [*MEGABATCH, "status"]])
def test_an_output_that_cannot_be_written_is_one_line(words: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, env=ENVIRONMENT, check=False)
    *_, last = done.stderr.decode().splitlines()
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert last == "error: standard output or a file cannot be written: No space left on device"


@pytest.mark.parametrize(
    "words",
    [
        [sys.executable, str(RECIPE), "--dry_run"],
        [*MEGABATCH, "status"],
        [sys.executable, "-m", "megabatch.converters.command", "--help"],
    ],
)
def test_streams_that_are_closed(words: list[str], tmp_path: Path) -> None:
    closed = f"exec {shlex.join(words)} <&- >&- 2>{tmp_path}/errors"
    done = subprocess.run(["bash", "-c", closed], cwd=tmp_path, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, (tmp_path / "errors").read_text()


def test_what_a_child_prints_goes_nowhere_where_the_output_is_closed(tmp_path: Path) -> None:
    """The number of the closed output is not given to the next file."""
    code = (
        "from megabatch.command_line import open_streams as o; o(); import os; f = open('f', 'w'); os.system('echo x')"
    )
    subprocess.run(["bash", "-c", f"exec {sys.executable} -c {shlex.quote(code)} <&- >&-"], cwd=tmp_path, check=True)
    assert (tmp_path / "f").read_text() == ""


@pytest.mark.parametrize(
    "words",
    [
        [sys.executable, str(RECIPE), "--dry_run"],
        [sys.executable, "-m", "megabatch.converters.command", "--to_mcore", "--model", "a", "--output_dir", "b"],
    ],
)
def test_a_current_folder_that_was_removed(words: list[str], tmp_path: Path) -> None:
    gone = f"mkdir gone && cd gone && rmdir ../gone && exec {shlex.join(words)}"
    done = ended(["bash", "-c", gone], tmp_path)
    assert done.returncode == 2
    assert done.stderr.decode() == "error: the current folder does not exist any more; go to another one (cd)\n"
