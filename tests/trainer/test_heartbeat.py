"""What heartbeat.json says of the start that writes it."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from megabatch.run_directory import RunDirectory
from megabatch.trainer.heartbeat import Heartbeat
from megabatch.trainer.ranks import Place


@pytest.mark.parametrize("job_id", ["123_4", None])
def test_the_job_by_its_own_name_and_the_versions(
    job_id: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "127")
    monkeypatch.delenv("MEGABATCH_JOB_ID", raising=False)
    if job_id:
        monkeypatch.setenv("MEGABATCH_JOB_ID", job_id)
    place = Place(rank=0, world_size=1, local_rank=0, attempt=2)
    Heartbeat(RunDirectory(tmp_path), place).beat("running", step=3)
    said = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (said["state"], said["step"], said["job_id"], said["attempt"]) == ("running", 3, job_id, 2)
    assert said["versions"]["torch"] == version("torch")
    assert said["versions"]["megatron-core"] == version("megatron-core")
