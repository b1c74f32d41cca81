"""What the ranks of a rendered job see, on a real Slurm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.queue import State
from megabatch.slurm.render import render
from megabatch.slurm.snapshot import snapshot_of
from megabatch.slurm.submit import submit

from .conftest import Submit

pytestmark = pytest.mark.slurm


def test_ranks_of_two_nodes_know_their_places_and_reach_rank_0(submit_payload: Submit, tmp_path: Path) -> None:
    job = submit_payload(
        nodes=2, tasks_per_node=2, gpus_per_node=2, cpus_per_task=3, options={"meet": str(tmp_path / "met.json")}
    )
    assert job.wait().state is State.COMPLETED
    assert json.loads((tmp_path / "met.json").read_text()) == [1, 2, 3]
    seen = [job.said(rank)[0]["environment"] for rank in range(4)]
    assert [e["RANK"] for e in seen] == ["0", "1", "2", "3"]
    assert [e["LOCAL_RANK"] for e in seen] == ["0", "1", "0", "1"]
    assert [e["SLURM_NODEID"] for e in seen] == ["0", "0", "1", "1"]
    for environment in seen:
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert environment["MASTER_ADDR"] == "127.0.0.1", (
            "node names do not resolve here: the address must come from Slurm"
        )
        assert int(environment["MASTER_PORT"]) < 32768
        assert environment["MEGABATCH_ATTEMPT"] == "0"
        assert environment["SLURM_CPUS_PER_TASK"] == "3"
        assert len(environment["CUDA_VISIBLE_DEVICES"].split(",")) == 2
        assert Path(environment["TRITON_CACHE_DIR"]).parent.stat().st_mode & 0o077 == 0


def test_variables_of_the_submitting_shell_do_not_win_over_the_script(
    submit_payload: Submit, scontrol: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch prefers its own variables to directives; what no directive says is the user's."""
    said = {"TIMELIMIT": "1", "JOB_NAME": "other", "NO_REQUEUE": "1", "SIGNAL": "B:TERM@1", "OPEN_MODE": "t"}
    for name, value in said.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    monkeypatch.setenv("SBATCH_PARTITION", "urgent")
    job = submit_payload()
    shown = scontrol("show", "job", job.job_id)
    for word in ("JobName=payload", "TimeLimit=00:10:00", "Requeue=1", "Partition=urgent"):
        assert word in shown, shown
    assert job.wait().state is State.COMPLETED


HOSTILE = """a b 'c' "d" $(touch {0}/ran) `touch {0}/ran` ; touch {0}/ran # é漢 \\ * ! & | < > ${{HOME}} %j %% \\n"""


def test_hostile_text_is_only_text(submit_payload: Submit, tmp_path: Path, scontrol: Callable[..., str]) -> None:
    text = HOSTILE.format(tmp_path)
    folder = """run 'q' "d" $(touch ran) `touch ran` ; é漢 #1 & | 100% %% ~ * !"""
    code = snapshot_of(tmp_path / "snap $(touch ran)")
    code.store()
    (tmp_path / "cache $(touch ran)").mkdir()
    job = submit_payload(
        name=text + "\nsecond line",
        run_directory=tmp_path / folder,
        working_directory=tmp_path,
        environment={"HOSTILE": text + "\nline\ttab'", "EMPTY": "", "PATH": "/no where"},
        snapshot=code.path,
        profile=ClusterProfile(local_cache=str(tmp_path / "cache $(touch ran)")),
        options={text: text + "\nline"},
    )
    assert job.wait().state is State.COMPLETED
    said = job.said(0)[0]
    assert said["argv"] == [f"{text}={text}\nline"]
    assert said["environment"]["HOSTILE"] == text + "\nline\ttab'"
    assert said["environment"]["EMPTY"] == ""
    assert said["environment"]["PATH"].startswith("/no where:/"), "the script finds srun and scontrol all the same"
    used = Path(said["environment"]["PYTHONPATH"].partition(":")[0])
    assert used.is_relative_to(tmp_path / "cache $(touch ran)") and used.name == code.path.name[:16]
    assert said["environment"]["MEGABATCH_RUN"] == str(tmp_path / folder)
    assert said["cwd"] == str(tmp_path)
    assert "JobName=" + (text + " second line").strip() in scontrol("show", "job", job.job_id)
    assert (job.run.logs / f"batch.{job.job_id}.log").exists()
    assert not list(tmp_path.rglob("ran"))


def test_no_secret_is_in_any_file(submit_payload: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    job = submit_payload(inherit=("HF_TOKEN", "WANDB_API_KEY"))
    job.wait()
    assert job.said(0)[0]["environment"]["HF_TOKEN"] == "hf_verysecret"
    assert "WANDB_API_KEY is not set in the submitting shell" in job.batch_log()
    texts = [
        path.read_text() for path in job.run.path.rglob("*") if path.is_file() and not path.name.startswith("rank_")
    ]
    assert not any("hf_verysecret" in text for text in texts)


def test_modules_and_setup_run_before_the_ranks(submit_payload: Submit) -> None:
    module = 'module() { export LOADED="$*"; }'
    job = submit_payload(profile=ClusterProfile(setup=(module, "export SET_UP=yes"), modules=("cuda/12.4", "nccl")))
    job.wait()
    environment = job.said(0)[0]["environment"]
    assert (environment["SET_UP"], environment["LOADED"]) == ("yes", "load cuda/12.4 nccl")


def test_a_real_module_reaches_the_ranks(submit_payload: Submit, tmp_path: Path) -> None:
    """Environment Modules or Lmod, whichever is installed; both read this file."""
    if not any(Path(path).exists() for path in ("/etc/profile.d/modules.sh", "/etc/profile.d/lmod.sh")):
        pytest.skip("no modules here; on Debian: apt install environment-modules")
    folder = tmp_path / "modulefiles"  # Lmod itself fails at a space
    (folder / "cuda").mkdir(parents=True)
    (folder / "cuda" / "12.8").write_text("#%Module1.0\nsetenv CUDA_HOME {/opt/cuda 12.8}\nprepend-path PATH /opt/x\n")
    profile = ClusterProfile(setup=(f"module use {folder.as_posix()!r}",), modules=("cuda/12.8",))
    job = submit_payload(profile=profile, nodes=2)
    assert job.wait().state is State.COMPLETED, job.batch_log()
    for rank in range(2):
        environment = job.said(rank)[0]["environment"]
        assert environment["CUDA_HOME"] == "/opt/cuda 12.8"
        assert "/opt/x" in environment["PATH"].split(":")
    missing = submit_payload(
        profile=ClusterProfile(modules=("cuda/99",)), run_directory=job.run.path.with_name("missing"), requeue=False
    )
    assert missing.wait().state is State.FAILED
    assert "cuda/99" in missing.batch_log() and not missing.said(0)


def test_a_failing_setup_line_fails_the_job(submit_payload: Submit) -> None:
    job = submit_payload(profile=ClusterProfile(setup=("false",)))
    assert job.wait().state is State.FAILED
    assert not job.said(0)


def test_a_job_whose_dependency_failed_leaves_the_queue(submit_payload: Submit) -> None:
    first = submit_payload(options={"fail_rank": 0, "fail": 1})
    first.wait()
    profile = ClusterProfile(sbatch={"dependency": f"afterok:{first.job_id}"})
    second = submit_payload(profile=profile, run_directory=first.run.path.with_name("second"))
    assert second.wait().state is State.CANCELLED


@pytest.mark.parametrize("folder", ["new\nline", "back\\slash", "job %j"])
def test_folders_that_slurm_cannot_name_are_refused(submit_payload: Submit, tmp_path: Path, folder: str) -> None:
    with pytest.raises(LaunchError, match=r"another name|cannot hold"):
        submit_payload(run_directory=tmp_path / folder)
    assert not list(tmp_path.rglob("jobs.jsonl"))


@pytest.mark.parametrize(
    ("profile", "spec", "message", "fix"),
    [
        (ClusterProfile(partition="nowhere"), {}, "invalid partition", "sinfo"),
        (ClusterProfile(), {"nodes": 99}, "more processors", "resources.nodes"),
        (ClusterProfile(), {"gpus_per_node": 9}, "not available", "sinfo"),
        (ClusterProfile(), {"cpus_per_task": 999}, "more processors", "cpus_per_task"),
    ],
)
def test_what_slurm_refuses_is_explained(
    submit_payload: Submit,
    payload_job: JobSpec,
    *,
    profile: ClusterProfile,
    spec: dict[str, int],
    message: str,
    fix: str,
) -> None:
    with pytest.raises(LaunchError, match=f"(?is)nothing was queued.*{message}.*{fix}"):
        submit_payload(profile=profile, **spec)
    assert not payload_job.files.jobs.exists()


def test_the_script_can_be_piped_into_sbatch(slurm: object, payload_job: JobSpec) -> None:
    script = render(payload_job, ClusterProfile())
    payload_job.files.logs.mkdir(parents=True)
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_slurm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"sbatch and srun not found.*--local"):
        submit(RunDirectory(tmp_path), "#!/bin/bash\n")
