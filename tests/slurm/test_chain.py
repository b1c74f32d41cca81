"""Jobs that wait for each other, on a real Slurm."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.chain import ChainedJob, dependency, forbids_requeue, submit_all
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.control import cancel
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.render import render
from megabatch.slurm.script.links import linked
from megabatch.slurm.state import active_jobs

from .conftest import PAYLOAD, Submitted, payload_spec, until

NODE = ClusterProfile(sbatch={"nodelist": "n4"})


def chained(
    folder: Path,
    name: str,
    *,
    options: dict[str, object] | None = None,
    spec: dict[str, object] | None = None,
    **words: object,
) -> ChainedJob:
    """A payload in `folder/name`; `words` are of the chain, `spec` of its JobSpec."""
    arguments = (str(PAYLOAD), *(f"{key}={value}" for key, value in (options or {}).items()))
    job = replace(payload_spec(folder / name), arguments=arguments, **(spec or {}))  # type: ignore[arg-type]
    return ChainedJob(name=name, run=job.files, script=render(job, NODE), links=job.links, **words)  # type: ignore[arg-type]


def submitted(jobs: list[ChainedJob]) -> dict[str, Submitted]:
    ids = submit_all(jobs)
    return {job.name: Submitted(job.run, ids[job.name][-1]) for job in jobs}


def states(jobs: dict[str, Submitted]) -> dict[str, State]:
    return {name: job.wait().state for name, job in jobs.items()}


def queue() -> str:
    return subprocess.run(["squeue", "--noheader", "--format=%i"], capture_output=True, text=True, check=True).stdout


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_step_fails_in_the_middle(tmp_path: Path) -> None:
    """Nothing after it runs as if it had ended well, what waits for a failure does, and nothing stays in the queue."""
    jobs = submitted(
        [
            chained(tmp_path, "first"),
            chained(tmp_path, "fails", options={"fail_rank": 0, "fail": 3}, after=(("ok", "first"),)),
            chained(tmp_path, "never", after=(("ok", "fails"),)),
            chained(tmp_path, "reports", after=(("notok", "fails"),)),
            chained(tmp_path, "always", after=(("any", "never"), ("ok", "first"))),
        ]
    )
    assert states(jobs) == {
        "first": State.COMPLETED,
        "fails": State.FAILED,
        "never": State.CANCELLED,
        "reports": State.COMPLETED,
        "always": State.COMPLETED,
    }
    assert jobs["fails"].now().exit_code == 3
    assert not jobs["never"].said(0)
    assert not set(queue().split()) & {job.job_id for job in jobs.values()}


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_job_that_requeues_keeps_those_that_wait_for_it_waiting(tmp_path: Path) -> None:
    """Its script ends with 0 each time, and its ranks had ended with 75: neither may count as an end."""
    options = {"until_attempt": 1}
    jobs = submitted(
        [
            chained(tmp_path, "requeues", options=options),
            *(chained(tmp_path, f"after_{kind}", after=((kind, "requeues"),)) for kind in ("ok", "notok", "any")),
        ]
    )
    first = jobs["requeues"]
    first.wait_listening()
    subprocess.run(["scancel", "--batch", "--signal=USR2", first.job_id], check=True)
    first.wait_listening(attempt=1)
    assert all(not job.said(0) for name, job in jobs.items() if name != "requeues"), "nobody started in between"
    assert first.said(0)[-1] == {"stopped": "SIGUSR2"}
    assert states(jobs) == {
        "requeues": State.COMPLETED,
        "after_ok": State.COMPLETED,
        "after_notok": State.CANCELLED,
        "after_any": State.COMPLETED,
    }


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_links_go_on_until_the_run_is_done_and_the_rest_never_start(tmp_path: Path) -> None:
    links = {"links": 3, "requeue": False}
    run = chained(tmp_path, "run", options={"until_attempt": 1}, spec=links)
    after = chained(tmp_path, "after", after=(("ok", "run"),))
    notok = chained(tmp_path, "notok", after=(("notok", "run"),))
    ids = submit_all([run, after, notok])
    assert len(ids["run"]) == 3
    first, second, third = (Submitted(run.run, job_id) for job_id in ids["run"])
    first.wait_listening()
    assert first.now().job_id == first.job_id
    subprocess.run(["scancel", "--batch", "--signal=USR2", first.job_id], check=True)
    end = second.wait()
    assert (end.state, end.job_id) == (State.COMPLETED, second.job_id)
    assert [job.endings[0].exit_code for job in read_records(run.run) if job.endings] == [75, 0]
    assert [start.attempt for job in read_records(run.run) for start in job.starts] == [0, 1], "logs do not collide"
    assert Submitted(after.run, ids["after"][0]).wait().state is State.COMPLETED
    assert Submitted(notok.run, ids["notok"][0]).wait().state is State.CANCELLED
    assert not third.batch_log(), "the third link was never given a node"


@pytest.mark.parametrize("preflight", ["none", "light"])
def test_a_stored_script_becomes_what_links_would_have_got(tmp_path: Path, preflight: str) -> None:
    job = replace(payload_spec(tmp_path), preflight=preflight)  # type: ignore[arg-type]
    links = render(replace(job, links=2, requeue=False), NODE)
    for stored in (render(job, NODE), render(replace(job, requeue=False), NODE), links):
        assert linked(stored, job.files) == links
    with pytest.raises(LaunchError, match="is not as it was written"):
        linked("#!/bin/bash\nsrun true\n", job.files)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("#SBATCH --requeue\n", ""),
        ("#SBATCH --requeue\n", "#SBATCH --requeue\n#SBATCH --no-requeue\n"),
        ("#SBATCH --requeue\n", "#SBATCH --no-requeue\n"),
        ("then leave_out; fi\n", "then leave_out; true; fi\n"),
        ("# after TERM, and once Slurm", "# then"),
        ('exit "$status"\n', 'exit "$status"\n# edited\n'),
        ("export MEGABATCH_RUN=", "declare -x MEGABATCH_RUN="),
        ("export MEGABATCH_RUN=", "export MEGABATCH_RUN=/x\nexport MEGABATCH_RUN="),
    ],
)
def test_a_stored_script_that_was_edited_is_not_half_changed(tmp_path: Path, written: str, found: str) -> None:
    job = replace(payload_spec(tmp_path), preflight="light")
    before, place, after = render(job, NODE).rpartition(written)
    assert place
    with pytest.raises(LaunchError, match=r"job\.sbatch is not as it was written; submit its recipe again"):
        linked(before + found + after, job.files)


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_run_that_was_one_job_is_resumed_in_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = chained(tmp_path, "run", options={"until_attempt": 2})
    first = submitted([run])["run"]
    run.run.run_json.write_text("{}")
    first.wait_listening()
    cancel(run.run.path)
    first.wait()
    assert main(["resume", str(run.run.path), "--chain", "3"]) == 0
    ids = [job.job_id for job in read_records(run.run)][1:]
    assert capsys.readouterr().out == f"jobs {', '.join(ids)} resume {run.run.path}\n" and len(ids) == 3
    second, third, last = (Submitted(run.run, job_id) for job_id in ids)
    second.wait_listening(attempt=1)
    subprocess.run(["scancel", "--batch", "--signal=USR2", second.job_id], check=True)
    assert third.wait().job_id == third.job_id and not last.batch_log()
    assert [job.endings[-1].exit_code for job in read_records(run.run)[1:] if job.endings] == [75, 0]
    assert main(["resume", str(run.run.path)]) == 0
    assert "note: like the run's earlier jobs, it does not requeue; --chain N" in capsys.readouterr().out
    until(lambda: not active_jobs(run.run.path), what="the last job")


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_links_do_not_burn_the_queue_after_a_failure(tmp_path: Path) -> None:
    run = chained(tmp_path, "run", options={"fail_rank": 0, "fail": 2}, spec={"links": 3, "requeue": False})
    ids = submit_all([run])["run"]
    last = Submitted(run.run, ids[-1])
    until(lambda: not active_jobs(run.run.path), what="the links")
    assert [len(job.starts) for job in read_records(run.run)].count(1) == 1, "only the first link started ranks"
    assert "ended with exit code 2: nothing left to do" in last.batch_log()
    end = last.now()
    assert (end.state, end.exit_code) == (State.FAILED, 2)


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_run_in_links_is_cancelled_whole(tmp_path: Path) -> None:
    run = chained(tmp_path, "run", options={"until_attempt": 1}, spec={"links": 3, "requeue": False})
    ids = submit_all([run])["run"]
    Submitted(run.run, ids[0]).wait_listening()
    assert cancel(run.run.path) == ", ".join(ids)
    assert Submitted(run.run, ids[0]).wait().state is State.CANCELLED
    assert not active_jobs(run.run.path)


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_submission_that_fails_in_the_middle_leaves_nothing_in_the_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = chained(tmp_path, "refused", after=(("ok", "first"),))
    refused = replace(refused, script=refused.script.replace("#SBATCH --nodes=1", "#SBATCH --nodes=99"))
    with pytest.raises(LaunchError, match=r"refused: sbatch refused.*job \d+, submitted before it, was cancelled"):
        submit_all([chained(tmp_path, "first"), refused, chained(tmp_path, "last", after=(("ok", "refused"),))])
    assert Submitted(RunDirectory(tmp_path / "first" / "run"), "?").wait().state is State.CANCELLED
    assert not Submitted(RunDirectory(tmp_path / "first" / "run"), "?").said(0), "it was held, so it never ran"
    assert not (tmp_path / "last").exists()
    assert capsys.readouterr() == ("", ""), "the error holds what sbatch said"


@pytest.mark.slurm
def test_a_cluster_that_does_not_requeue_is_recognised(slurm: PrivateCluster, scontrol: Callable[..., str]) -> None:
    done = subprocess.run(
        ["sbatch", "--parsable", "--hold", "--requeue", "--output=/dev/null", "--wrap=true"],
        capture_output=True,
        text=True,
        check=True,
    )
    job_id = done.stdout.strip()
    assert not forbids_requeue(job_id)
    scontrol("update", f"JobId={job_id}", "Requeue=0")  # what a site's job_submit plugin does
    assert forbids_requeue(job_id)
    subprocess.run(["scancel", job_id], check=True)


def test_what_slurm_cannot_say_is_refused(tmp_path: Path) -> None:
    job = ChainedJob(name="x", run=RunDirectory(tmp_path), script="", after=(("ok", "a"), ("ok", "b")))
    ids = {"a": ("1", "2"), "b": ("3",)}
    with pytest.raises(LaunchError, match="x cannot wait for anything but a, which has 2 links"):
        dependency(job, ids=ids)
    assert dependency(replace(job, after=(("ok", "a"),)), ids=ids) == "afterok:1?afterok:2"
    assert dependency(replace(job, after=(("notok", "a"),), singleton=True), ids=ids) == (
        "afternotok:1,afternotok:2,singleton"
    )
    assert dependency(replace(job, after=(("ok", "b"),)), ids=ids, links=("4", "5")) == (
        "afterok:3,afternotok:4,afternotok:5"
    )
    assert dependency(replace(job, after=()), ids=ids) is None
