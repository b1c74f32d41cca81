"""Jobs whose nodes have roles: ranks and real HTTP servers, on a real Slurm and on this machine."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabatch.config.roles import Role
from megabatch.errors import LaunchError
from megabatch.insight.diagnosis import diagnose
from megabatch.slurm.job import JobSpec
from megabatch.slurm.local import run_local
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records
from megabatch.slurm.render import render
from megabatch.slurm.roles import allocation
from megabatch.slurm.submit import submit

from .conftest import Submitted, payload_spec

SERVER, CLIENT = (str(Path(__file__).with_name(name)) for name in ("server.py", "client.py"))


def job_of(
    folder: Path, *, server: dict[str, object] | None = None, client: dict[str, object] | None = None
) -> JobSpec:
    """Two ranks on a node each, and a server on a third."""
    words = {name: tuple(f"{k}={v}" for k, v in (of or {}).items()) for name, of in (("s", server), ("c", client))}
    role = Role(name="server", command=("python", SERVER, *words["s"]), ready_s=60)
    return replace(payload_spec(folder), nodes=2, arguments=(CLIENT, *words["c"]), roles=(role,))


def submitted(job: JobSpec) -> Submitted:
    return Submitted(job.files, submit(job.files, render(job, ClusterProfile())).job_id)


def started(job: Submitted, attempt: int = 0) -> None:
    job.wait_listening(attempt=attempt, ranks=2)


def all_text(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_ranks_start_once_all_servers_answer_and_end_the_job(tmp_path: Path) -> None:
    job = job_of(tmp_path, server={"ready_s": 2})
    role = replace(job.roles[0], nodes=2, tasks_per_node=2, gpus_per_node=2)
    run = submitted(replace(job, nodes=1, tasks_per_node=2, gpus_per_node=1, roles=(role,)))
    assert run.wait().state is State.COMPLETED
    assert [run.said(rank)[0]["answers"] for rank in range(2)] == [[9] * 4, [16] * 4]
    [first, second] = (run.said(rank)[0] for rank in range(2))
    assert first["SLURMD_NODENAME"] == second["SLURMD_NODENAME"] and first["WORLD_SIZE"] == "2"
    assert len(first["CUDA_VISIBLE_DEVICES"].split(",")) == 1
    logs = sorted(path.name for path in run.run.logs.glob("server_*"))
    assert logs == [f"server_{task}.0.log" for task in range(4)]
    for name in logs:
        text = (run.run.logs / name).read_text()
        assert text.startswith(f"serving server {name[7]} False"), "a server does not take itself for a rank"
        assert '"GET /health HTTP/1.0" 200' in text
        assert '"GET /square/3' in text and " 401 " not in text
    before, answers, after = (run.run.logs / "server_0.0.log").read_text().partition('"GET /health HTTP/1.0" 200')
    assert '"GET /health HTTP/1.0" 503' in before and answers and "square" not in before and "square" in after


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_the_token_is_random_and_nowhere_but_in_their_environment(
    tmp_path: Path, scontrol: Callable[..., str]
) -> None:
    run = submitted(job_of(tmp_path, client={"until_attempt": 1}))
    started(run)
    tokens, lines = set(), []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            if f"SLURM_JOB_ID={run.job_id}" in environment:
                tokens |= {word for word in environment if word.startswith("MEGABATCH_ROLE_TOKEN=")}
            lines.append((entry / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    [found] = tokens
    token = found.partition("=")[2]
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert not any(token in line for line in lines)
    assert token not in all_text(run.run.path)
    assert token not in scontrol("show", "job", run.job_id)
    subprocess.run(["scancel", run.job_id], check=True)
    assert run.wait().state is State.CANCELLED
    assert token not in all_text(run.run.path)


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_server_that_dies_has_the_ranks_save_and_the_job_fails_of_it(tmp_path: Path) -> None:
    job = job_of(tmp_path, server={"dies_after": 2}, client={"until_attempt": 1})
    run = submitted(replace(job, requeue=False))
    end = run.wait()
    assert (end.state, end.exit_code) == (State.FAILED, 9)
    assert [run.said(rank)[-1] for rank in range(2)] == [{"stopped": True}] * 2, "both were asked, and saved"
    log = run.batch_log()
    assert re.search(
        r"role server, task 0 on n\d ended with exit code 9 while the ranks ran.*: logs/server_0\.0\.log", log
    )
    assert "    error: out of luck" in log, "its last lines"
    assert "failed first" not in log
    found = diagnose(run.run.path)
    assert found.cause is not None and (found.cause.name, found.role, found.exit_code) == ("role", "server, task 0", 9)
    assert "error: out of luck" in "\n".join(found.last_lines) and found.node is not None
    assert [ending.exit_code for ending in read_records(run.run)[0].endings] == [9]


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_job_with_roles_comes_back(tmp_path: Path, controller_sends_srun_away: Callable[[int], None]) -> None:
    """Once because its server died, as failures that may pass do; with a new server it ends well.

    An srun that the controller sends away costs no attempt, whether servers or ranks wait for it.
    """
    controller_sends_srun_away(2)
    run = submitted(job_of(tmp_path, server={"dies_after": 2, "dies_until": 1}, client={"until_attempt": 1}))
    end = run.wait()
    assert (end.state, end.attempt) == (State.COMPLETED, 1)
    assert [ending.exit_code for ending in read_records(run.run)[0].endings] == [9, 0]
    assert run.said(0, 1)[0]["answers"] == [9]
    assert (run.run.logs / "server_0.1.log").exists()


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
@pytest.mark.parametrize(
    ("server", "role", "code", "says"),
    [
        ({"exit": 7}, {}, 7, r"task 0 on n\d ended with exit code 7 before it was ready.*\n(.*\n)*.*told to fail"),
        (
            {"ready_s": 60},
            {"ready_s": 2},
            1,
            r"task 0 on n\d did not answer /health within 2 s: logs/server_0\.0\.log",
        ),
        ({}, {"health": "/nothing here"}, None, "health"),
    ],
)
def test_without_a_ready_server_no_rank_starts(
    tmp_path: Path, *, server: dict[str, object], role: dict[str, Any], code: int | None, says: str
) -> None:
    job = job_of(tmp_path, server=server)
    job = replace(job, roles=(replace(job.roles[0], **role),))
    if code is None:
        with pytest.raises(LaunchError, match=says):
            render(job, ClusterProfile())
        return
    run = submitted(job)
    end = run.wait()
    assert (end.state, end.exit_code, end.attempt) == (State.FAILED, code, 0)
    assert re.search(says, run.batch_log())
    assert not list(run.run.logs.glob("rank_*"))


def test_roles_on_this_machine(tmp_path: Path) -> None:
    terminal = io.BytesIO()
    job = replace(job_of(tmp_path, server={"ready_s": 0.5}), nodes=1, tasks_per_node=2)
    job = replace(job, roles=(replace(job.roles[0], tasks_per_node=2),))
    assert run_local(job, terminal=terminal) == 0
    assert json.loads(terminal.getvalue().splitlines()[0])["answers"] == [9, 9]
    assert (job.files.logs / "server_1.0.log").read_text().startswith("serving server 1 False")


def test_a_server_that_dies_on_this_machine(tmp_path: Path) -> None:
    terminal = io.BytesIO()
    job = job_of(tmp_path, server={"dies_after": 2}, client={"until_attempt": 1})
    assert run_local(job, terminal=terminal) == 9
    said = terminal.getvalue().decode()
    assert (
        "role server, task 0 ended with exit code 9 while the ranks ran" in said and "    error: out of luck" in said
    )
    assert '{"stopped": true}' in job.files.rank_log(1, 0).read_text()


def test_ranks_that_do_not_save_after_their_server_died_are_ended(tmp_path: Path) -> None:
    job = job_of(tmp_path, server={"dies_after": 2}, client={"until_attempt": 1, "deaf": 1})
    assert run_local(replace(job, signal_delay_s=1), terminal=io.BytesIO()) == 9
    assert "stopped" not in job.files.rank_log(0, 0).read_text()


def test_a_server_that_never_gets_ready_on_this_machine(tmp_path: Path) -> None:
    terminal = io.BytesIO()
    assert run_local(job_of(tmp_path, server={"exit": 7}), terminal=terminal) == 7
    assert "ended with exit code 7 before it was ready" in terminal.getvalue().decode()
    assert not job_of(tmp_path).files.rank_log(0, 0).read_text()


def test_the_allocation_fits_the_largest_role(tmp_path: Path) -> None:
    job = replace(job_of(tmp_path), tasks_per_node=8, cpus_per_task=4, gpus_per_node=8)
    [server] = job.roles
    wide = replace(job, roles=(replace(server, nodes=3, cpus_per_task=64, gpus_per_node=4),))
    got = allocation(wide)
    assert (got.nodes, got.tasks_per_node, got.cpus_per_task, got.gpus_per_node) == (5, 1, 64, 8)
    script = render(wide, ClusterProfile())
    assert (
        "#SBATCH --nodes=5\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=64\n#SBATCH --gpus-per-node=8"
        in script
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "Server"}, "lower-case"),
        ({"name": "rank"}, "not be rank"),
        ({"command": ()}, "list of"),
        ({"nodes": 0}, "at least 1"),
    ],
)
def test_faulty_roles_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    job = job_of(tmp_path)
    job = replace(job, roles=(replace(job.roles[0], **change),))
    with pytest.raises(LaunchError, match=says):
        render(job, ClusterProfile())
    twice = replace(job_of(tmp_path), roles=job_of(tmp_path).roles * 2)
    with pytest.raises(LaunchError, match="names 2 roles"):
        render(twice, ClusterProfile())
