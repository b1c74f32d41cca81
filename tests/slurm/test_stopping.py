"""How runs stop and come back, on a real Slurm."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest

from megabatch.insight.diagnosis import diagnose
from megabatch.slurm.cluster import PrivateCluster
from megabatch.slurm.control import cancel, resume
from megabatch.slurm.logs import rank_logs
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records

from .conftest import Submit, Submitted, payload_spec, submit_job, until

pytestmark = pytest.mark.slurm

FIRST_NODES = ClusterProfile(partition="urgent", sbatch={"nodelist": "n[1-2]"})
"""Out of reach of preemption."""
LAST_NODES = ClusterProfile(sbatch={"nodelist": "n[3-4]"})


@pytest.fixture(scope="module", autouse=True)
def time_limited(slurm_cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """Submitted first, looked at last: the warning takes half a minute, in which the other tests run."""
    # Slurm rounds limits up to minutes and warns up to half a minute early: this warns within half a minute
    job = replace(
        payload_spec(tmp_path_factory.mktemp("limit")), nodes=2, tasks_per_node=2, time="1", signal_delay_s=40
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in slurm_cluster.environment.items():
            environment.setenv(name, value)
        return submit_job(job, profile=FIRST_NODES, options={"until_attempt": 1})


def test_a_warning_before_the_ranks_listen_is_not_lost(submit_payload: Submit) -> None:
    job = submit_payload(requeue=False, options={"until_attempt": 1, "deaf": "asked"})
    until(job.run.rank_log(0, 0).exists)
    subprocess.run(["scancel", "--batch", "--signal=USR2", job.job_id], check=True)
    end = job.wait()
    assert job.said(0)[-1] == {"stopped": "file"}
    # it may not requeue: the code says why it ended
    assert (end.state, end.exit_code, end.attempt) == (State.STOPPED, 75, 0)


def test_a_warning_before_the_ranks_start_starts_none(submit_payload: Submit) -> None:
    job = submit_payload(requeue=False, profile=ClusterProfile(setup=('until [ -n "$stop" ]; do sleep 0.1; done',)))
    until(lambda: "megabatch: attempt 0 of job" in job.batch_log(), what="the script, which listens by then")
    subprocess.run(["scancel", "--batch", "--signal=USR2", job.job_id], check=True)
    assert job.wait().state is State.STOPPED
    assert not rank_logs(job.run.path)


def test_a_cancelled_run_saves_and_stays_away_until_resumed(submit_payload: Submit) -> None:
    job = submit_payload(nodes=2, options={"until_attempt": 2})
    job.wait_listening(ranks=2)
    assert cancel(job.run.path) == job.job_id
    end = job.wait()
    assert (end.state, end.attempt) == (State.CANCELLED, 0)
    assert {job.said(rank)[-1]["stopped"] for rank in range(2)} <= {"SIGTERM", "SIGUSR2"}
    # the script asked Slurm who ended it, before Slurm forgets
    assert [(end.exit_code, end.cancelled) for end in read_records(job.run)[0].endings] == [(75, True)]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SLURM_CONF", "/nowhere/slurm.conf")
        assert (job.now().state, job.now().source) == (State.CANCELLED, "records")
    second = resume(job.run.path)
    assert second != job.job_id
    job.wait_listening(attempt=1, ranks=2)
    # the second job's logs are its own: attempts count over the run
    assert [record.job_id for record in read_records(job.run)] == [job.job_id, second]
    assert [[start.attempt for start in record.starts] for record in read_records(job.run)] == [[0], [1]]
    assert len(job.said(0)) == 2 and "SLURM_RESTART_COUNT" not in job.said(0, 1)[0]["environment"]
    subprocess.run(["scancel", second], check=True)


def test_preemption_requeues_through_slurm(submit_payload: Submit) -> None:
    job = submit_payload(profile=LAST_NODES, nodes=2, tasks_per_node=2, options={"until_attempt": 1})
    job.wait_listening(ranks=4)
    urgent = ["sbatch", "--partition=urgent", "--nodelist=n[3-4]", "--exclusive", "--output=/dev/null", "--wrap=true"]
    subprocess.run(urgent, check=True, capture_output=True)
    job.wait_listening(attempt=1, ranks=4)
    end = job.wait()
    assert (end.state, end.attempt) == (State.COMPLETED, 1)
    assert all("stopped" in job.said(rank)[-1] for rank in range(4))
    # the batch script left the requeue to Slurm, which would otherwise have restarted it twice
    assert "refused" not in job.batch_log()


def test_a_node_that_goes_down_requeues(submit_payload: Submit, scontrol: Callable[..., str]) -> None:
    profile = ClusterProfile(sbatch={"nodelist": "n4"})
    job = submit_payload(profile=profile, options={"until_attempt": 1})
    job.wait_listening()
    scontrol("update", "NodeName=n4", "State=DOWN", "Reason=test")
    try:
        assert job.wait(State.PENDING).attempt == 1
    finally:
        bring_back(scontrol, "n4")
    end = job.wait()
    assert (end.state, end.attempt) == (State.COMPLETED, 1)


def test_ranks_that_a_failed_node_took_along_are_not_done(
    submit_payload: Submit, scontrol: Callable[..., str]
) -> None:
    """srun ends with exit code 0 then."""
    job = submit_payload(profile=ClusterProfile(sbatch={"nodelist": "n4"}), options={"deaf": "ever"}, requeue=False)
    until(job.run.rank_log(0, 0).exists)
    scontrol("update", "NodeName=n4", "State=DOWN", "Reason=test")
    try:
        job.wait(State.NODE_FAIL)
        [ending] = until(lambda: read_records(job.run)[0].endings, what="the script's last word")
    finally:
        bring_back(scontrol, "n4")
    assert ending.exit_code != 0
    found = diagnose(job.run.path)
    assert found.cause is not None and (found.cause.name, found.node) == ("node_failure", "n4")


def bring_back(scontrol: Callable[..., str], node: str) -> None:
    """Slurm refuses while the node is still being cleaned up."""

    def resumed() -> bool:
        try:
            scontrol("update", f"NodeName={node}", "State=RESUME")
        except subprocess.CalledProcessError:
            return "State=DOWN" not in scontrol("show", "node", node)
        return True

    until(resumed, what=f"{node} to come back")


@pytest.mark.parametrize(("fail", "code", "deaf"), [("3", 3, False), ("1", 1, True), ("kill", 137, False)])
def test_one_dead_rank_ends_the_job_with_its_exit_code(
    submit_payload: Submit, fail: str, code: int, deaf: bool
) -> None:
    # ranks that do not listen are killed by srun with a larger code, which must not hide the first one's
    options = {"until_attempt": 1, "fail_rank": 3, "fail": fail} | ({"deaf": "ever"} if deaf else {})
    spec = {"nodes": 2, "tasks_per_node": 2, "max_requeues_without_progress": 0}
    job = submit_payload(profile=LAST_NODES, options=options, **spec)
    end = job.wait()
    assert (end.state, end.exit_code) == (State.FAILED, code)
    assert {"done": True} not in job.said(0)
    assert f"rank 3 on n4 failed first, with exit code {code}: logs/rank_3.0.log" in job.batch_log()


@pytest.mark.usefixtures("slurm")
def test_the_time_limits_warning_stops_all_ranks_together_and_requeues(time_limited: Submitted) -> None:
    job = time_limited
    job.wait_listening(attempt=1, ranks=4)
    assert [job.said(rank)[-1] for rank in range(4)] == [{"stopped": "SIGUSR2"}] * 4
    end = job.wait()
    assert (end.state, end.attempt) == (State.COMPLETED, 1)
    assert [job.said(rank, 1)[-1] for rank in range(4)] == [{"done": True}] * 4
    endings = [(e.attempt, e.exit_code) for e in read_records(job.run)[0].endings]
    assert endings == [(0, 75), (1, 0)]
    assert not list(job.run.logs.glob("stop*"))
