"""Conversions killed anywhere, resumed, shared by ranks, replaced: always the same bytes, or no output at all."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from killing import NEVER, convert_until, kill_and_resume, ways
from made_folders import MOE, contents, make_folder

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.conversion import make_plan
from megabatch.converters.engine.commit import commit
from megabatch.converters.engine.journal import Staged
from megabatch.converters.to_mcore import to_mcore
from megabatch.errors import ConversionError


@pytest.fixture(scope="module")
def mcore(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "mcore"
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return ways(tmp_path_factory.mktemp("ways"))


@pytest.mark.parametrize("number", range(7))
def test_killed_anywhere_and_resumed_the_files_are_identical(
    number: int, named: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """`killing.py --kills 100` is the long form."""
    title, given = list(named.items())[number]
    found = kill_and_resume(tmp_path, 2, random.Random(number), **given)
    assert (found.kills, found.faults) == (2, []), title


def test_killed_while_verifying_the_digests_are_complete(hf: Path, tmp_path: Path) -> None:
    given = {"to_mcore": True, "model": hf, "verify": True}
    calls = int(convert_until(NEVER, tmp_path / "whole", **given).stdout)
    expected = contents(tmp_path / "whole")
    assert b"null" not in expected["megabatch-manifest.json"]
    for number, place in enumerate(random.Random(6).sample(range(calls // 2, calls - 5), 3)):
        output = tmp_path / str(number)
        convert_until(place, output, **given)
        done = convert_until(NEVER, output, **given)
        assert done.returncode == 0, done.stderr
        assert contents(output) == expected


def test_a_kill_between_the_two_names_of_a_replaced_output(hf: Path, mcore: Path, tmp_path: Path) -> None:
    """The instant after the old and the new output were exchanged: the old one lies where the new one was staged."""
    output = tmp_path / "out"
    convert(ConversionRequest(to_mcore=True, model=hf, torch_dtype="float32"), output_dir=output)
    calls = int(convert_until(NEVER, tmp_path / "count", to_mcore=True, model=hf).stdout)
    for place in range(calls - 30, calls + 6):
        convert_until(place, output, to_mcore=True, model=hf)
        assert output.is_dir()
        if not (tmp_path / ".out.partial").exists():  # from here on there is nothing left to do
            break
    assert convert_until(NEVER, output, to_mcore=True, model=hf).returncode == 0
    assert contents(output) == contents(mcore)
    assert os.listdir(tmp_path) == ["out", "count"] or sorted(os.listdir(tmp_path)) == ["count", "out"]


def test_leftovers_are_taken_up_only_when_asked_and_only_of_the_same_plan(
    hf: Path, mcore: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    convert(
        ConversionRequest(to_mcore=True, model=hf), output_dir=output, rank=0, world=2
    )  # and the other half never came
    with pytest.raises(ConversionError, match=r"out\.partial: left by an interrupted .* bytes are done.*--resume"):
        convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output)
    with pytest.raises(ConversionError, match=r"out\.partial: left by a conversion of another source"):
        convert(ConversionRequest(to_mcore=True, model=hf, torch_dtype="float32"), output_dir=output, resume=True)
    outcome = convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output, resume=True)
    assert outcome.resumed > 0
    assert contents(output) == contents(mcore)
    assert convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output, resume=True).written == 0


def test_a_source_that_changed_is_another_plan(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", MOE)
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "out", rank=0, world=2)
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    with pytest.raises(ConversionError, match="left by a conversion of another source"):
        convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "out", resume=True)


def test_a_folder_that_is_not_ours_is_not_taken_for_a_leftover(hf: Path, tmp_path: Path) -> None:
    mine = tmp_path / ".out.partial" / "files" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("all of it")
    with pytest.raises(ConversionError, match="remove the folder"):
        convert(ConversionRequest(to_mcore=True, model=hf), output_dir=tmp_path / "out", resume=True)
    assert mine.read_text() == "all of it"


@pytest.mark.parametrize("world", [2, 3, 40])
def test_ranks_share_the_work_and_the_last_one_commits(world: int, hf: Path, mcore: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcomes = []
    for rank in random.Random(world).sample(range(world), world):
        assert not output.exists()
        outcomes.append(convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output, rank=rank, world=world))
    assert [outcome.committed for outcome in outcomes] == [False] * (world - 1) + [True]
    assert contents(output) == contents(mcore)


def test_ranks_at_the_same_time(hf: Path, mcore: Path, tmp_path: Path) -> None:
    for attempt in range(3):
        output = tmp_path / str(attempt)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "megabatch.converters.command", "--to_mcore", "--model", hf, "--output_dir",
                 output],
                env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "3"},
            )
            for rank in range(3)
        ]  # fmt: skip
        assert [rank.wait() for rank in ranks] == [0, 0, 0]
        assert contents(output) == contents(mcore)


def test_a_rank_that_was_killed_is_run_again_alone(hf: Path, mcore: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for rank in (0, 2):
        assert not convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output, rank=rank, world=3).committed
    outcome = convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output, resume=True)
    assert (outcome.committed, outcome.resumed > outcome.written) == (True, True)
    assert contents(output) == contents(mcore)


def test_an_output_is_replaced_only_when_told_and_only_when_the_new_one_is_whole(
    hf: Path, mcore: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(ConversionError, match=r"exists and is not empty.*--exist_ok"):
        convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output)
    seen: list[bool] = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.is_set():
            seen.append(output.is_dir())

    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output, exist_ok=True)
    watching.set()
    watcher.join()
    assert all(seen)
    assert contents(output) == contents(mcore)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_is_honoured(umask: int, hf: Path, mcore: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        convert(ConversionRequest(to_hf=True, mcore_model=mcore), output_dir=tmp_path / "hf")
        convert(ConversionRequest(to_mcore=True, model=hf), output_dir=tmp_path / "mcore")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        wanted = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == wanted & ~umask, path


def test_an_output_never_replaces_its_own_source(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", MOE)
    for output in (source, tmp_path):
        with pytest.raises(ConversionError, match="is in it, from which it is to be made"):
            convert(ConversionRequest(to_mcore=True, model=source), output_dir=output, exist_ok=True)
    convert(ConversionRequest(to_mcore=True, model=source), output_dir=tmp_path / "mcore")
    with pytest.raises(ConversionError, match="is in it, from which it is to be made"):
        convert(
            ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", model=source),
            output_dir=source,
            exist_ok=True,
        )


def test_more_files_than_a_process_may_usually_open(hf: Path, tmp_path: Path) -> None:
    to_mcore(hf, tmp_path / "mcore", files=80)
    code = (
        "import resource, sys; from megabatch.converters import ConversionRequest, convert; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])); "
        "request = ConversionRequest(to_hf=True, mcore_model=sys.argv[1], model=sys.argv[2]); "
        "convert(request, output_dir=sys.argv[3], verify=True)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "mcore", hf, tmp_path / "back"], check=True)


def start(rank: int, *, world: int, job: str, flags: list[str | Path]) -> subprocess.Popen[str]:
    """A task as a step of Slurm's numbers it; without a job, one that was started by hand."""
    place = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_STEP_ID": "0", "SLURM_JOB_ID": job}
    flags = flags if job else [*flags, "--rank", str(rank), "--world", str(world)]
    command = [sys.executable, "-m", "megabatch.converters.command", "--to_mcore", *flags]
    return subprocess.Popen(command, env={**os.environ, **(place if job else {})}, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("job", ["77", ""])
@pytest.mark.parametrize("together", [True, False])
def test_ranks_replace_an_older_output_of_the_same_plan(
    job: str, together: bool, hf: Path, mcore: Path, tmp_path: Path
) -> None:
    """Whatever their order, no rank takes the older output for one that the others have just finished."""
    output = tmp_path / "out"
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output)
    for path in output.glob("release/*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    flags: list[str | Path] = ["--model", hf, "--output_dir", output, "--exist_ok"]
    if together:
        ranks = [start(rank, world=3, job=job, flags=flags) for rank in range(3)]
        assert [rank.wait() for rank in ranks] == [0, 0, 0]
    else:
        for rank in (2, 0, 1):
            assert contents(output) != contents(mcore)
            assert start(rank, world=3, job=job, flags=flags).wait() == 0
    assert contents(output) == contents(mcore)
    assert os.listdir(tmp_path) == ["out"]


def test_ranks_take_up_what_another_start_left_only_when_told(hf: Path, mcore: Path, tmp_path: Path) -> None:
    """Rank 0 of job 1 is all that ran; job 2 must not commit its tensors together with its own, unless it resumes."""
    output = tmp_path / "out"
    flags: list[str | Path] = ["--model", hf, "--output_dir", output]
    assert start(0, world=2, job="1", flags=flags).wait() == 0
    for rank in (0, 1):
        task = start(rank, world=2, job="2", flags=flags)
        assert "left by an interrupted conversion of the same source" in task.communicate()[1]
        assert task.returncode == 1
    for rank in (0, 1):
        assert start(rank, world=2, job="2", flags=[*flags, "--resume"]).wait() == 0
    assert contents(output) == contents(mcore)
    assert start(0, world=2, job="3", flags=flags).wait() == 1  # exists
    assert start(0, world=2, job="3", flags=[*flags, "--resume"]).wait() == 0
    with pytest.raises(ConversionError, match="exists and is not empty"):
        convert(ConversionRequest(to_mcore=True, model=hf), output_dir=output, rank=1, world=2)


def test_a_rank_that_finds_its_own_journal_was_interrupted(hf: Path, tmp_path: Path) -> None:
    request = ConversionRequest(to_mcore=True, model=hf)
    half: dict[str, Any] = {"output_dir": tmp_path / "out", "rank": 0, "world": 2}
    assert not convert(request, **half).committed
    with pytest.raises(ConversionError, match=r"left by an interrupted .*--resume"):
        convert(request, **half)
    assert not convert(request, **half, resume=True).committed


def test_a_rank_killed_after_the_exchange_leaves_nothing_to_undo_it(
    hf: Path, mcore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old output, of the same plan, lies where the new one was staged; a rank that waited must leave it there."""
    output = tmp_path / "out"
    request = ConversionRequest(to_mcore=True, model=hf)
    convert(request, output_dir=output, exist_ok=True)
    for path in output.glob("release/*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    with monkeypatch.context() as killed:
        killed.setattr(Staged, "remove", lambda staged: None)
        for rank in (0, 1):
            convert(request, output_dir=output, exist_ok=True, rank=rank, world=2)
    assert (tmp_path / ".out.partial" / "files").is_dir()
    commit(make_plan(ConversionRequest(to_mcore=True, model=hf)), Staged(output), {}, world=2)
    assert contents(output) == contents(mcore)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_replacement_that_was_interrupted_is_finished(world: int, hf: Path, mcore: Path, tmp_path: Path) -> None:
    """Though the older output is of the same plan."""
    output = tmp_path / "out"
    request = ConversionRequest(to_mcore=True, model=hf)
    convert(request, output_dir=output)
    for path in output.glob("release/*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    convert(request, output_dir=output, exist_ok=True, rank=1, world=2)  # and the other half never came
    outcomes = [
        convert(request, output_dir=output, exist_ok=True, resume=True, rank=rank, world=world)
        for rank in range(world)
    ]
    assert outcomes[-1].committed
    assert contents(output) == contents(mcore)
    assert os.listdir(tmp_path) == ["out"]
    assert convert(request, output_dir=output, exist_ok=True, resume=True).written == 0
