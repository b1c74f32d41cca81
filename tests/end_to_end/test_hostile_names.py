"""A recipe's whole way through Slurm with names that a shell would run, and with secrets in the submitting shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megabatch.run_directory import RunDirectory
from megabatch.slurm.queue import State

from .conftest import RECIPES, Training
from .gate import Gate

pytestmark = pytest.mark.slurm

HOSTILE = """-a b 'c' "d" $(touch ran) `touch ran` ; touch ran # é漢 * ! & | < > ${HOME} 100%% ~"""
SECRETS = {"WANDB_API_KEY": "wandb-hunter2-0123456789", "HF_TOKEN": "hf-hunter2-0123456789"}


@pytest.fixture(scope="module")
def hostile(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Submitted from a hostile folder: recipe, data set, run directory, job name and profile have hostile names."""
    folder = tmp_path_factory.mktemp("hostile") / HOSTILE
    folder.mkdir()
    recipe, data = folder / f"{HOSTILE}.py", folder / f"{HOSTILE}.jsonl"
    shutil.copy(RECIPES / "quickstart.py", recipe)
    rows = [{"question": f"{k} + {k}?", "answer": str(k + k)} for k in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    profile = folder / f"{HOSTILE}.toml"
    profile.write_text(
        f"inherit = {json.dumps([*SECRETS, 'NOT_SET'])}\n"
        f"local_cache = {json.dumps(str(folder))}\n"
        f"[environment]\nHOSTILE = {json.dumps(HOSTILE + chr(10) + 'x')}\n"
        f'[sbatch]\nnodelist = "n4"\ncomment = {json.dumps(HOSTILE)}\n'
    )
    training = Training(RunDirectory(folder / f"run {HOSTILE}"), folder, environment | SECRETS, Gate(folder))
    flags = {
        "run_dir": training.files.path, "cluster": profile, "dataset": f"./{data.name}", "job_name": HOSTILE,
        "train_iters": 3, "lr_warmup_iters": 0, "eval_interval": 3, "save_interval": 3, "preflight": "light",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, "-P", f"./{recipe.name}", "--submit", *words],
        env=training.environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    training.wait(State.COMPLETED)
    return training


def test_a_hostile_recipe_trains_and_nothing_of_it_is_run(hostile: Training) -> None:
    assert hostile.steps() == [1, 2, 3]
    assert "preflight of 1 nodes: ok" in hostile.logs()
    assert not [path for path in hostile.folder.parent.rglob("ran")]
    assert not (Path.cwd() / "ran").exists() and not (Path.home() / "ran").exists()
    job = json.loads(hostile.files.jobs.read_text().splitlines()[0])["job_id"]
    shown = scontrol(hostile, "show", "job", job)
    assert f"JobName={HOSTILE}" in shown and f"Comment={HOSTILE}" in shown
    [said] = json.loads(hostile.megabatch("status", "--json"))
    assert said["run"] == str(hostile.files.path)


def test_secrets_of_the_shell_are_nowhere_on_disk(hostile: Training) -> None:
    """Slurm's controller alone keeps the environment of its jobs, in a folder that only its own user may read."""
    job = json.loads(hostile.files.jobs.read_text().splitlines()[0])["job_id"]
    cluster = Path(hostile.environment["SLURM_CONF"]).parent
    script = hostile.folder / "script"
    scontrol(hostile, "write", "batch_script", job, str(script))
    files = [path for path in (*hostile.folder.rglob("*"), *(cluster / "spool").rglob("*")) if path.is_file()]
    files += [path for path in cluster.glob("*.log") if path.is_file()]
    assert {script, hostile.files.run_json, hostile.files.script} <= set(files) and len(files) > 50
    leaks = [path for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS.values())]
    assert leaks == []
    assert not any(secret in scontrol(hostile, "show", "job", job) for secret in SECRETS.values())
    batch = hostile.files.script.read_text()
    assert all(f"{name} is not set" in batch for name in SECRETS), "the names are written, and only they"
    assert "NOT_SET is not set in the submitting shell" in hostile.logs()


def scontrol(training: Training, *words: str) -> str:
    environment = os.environ | {"SLURM_CONF": training.environment["SLURM_CONF"]}
    done = subprocess.run(["scontrol", *words], env=environment, capture_output=True, text=True, check=True)
    return done.stdout
