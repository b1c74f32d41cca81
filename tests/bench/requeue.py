"""From `scontrol requeue` to the job's next start, on a private Slurm: left alone, and with `megabatch resume`."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

from measure import Figure, median, sized

from megabatch.errors import LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.cluster import PrivateCluster, missing_programs
from megabatch.slurm.control import resume
from megabatch.slurm.submit import submit

TIMES = sized(3, 1)
SCRIPT = """\
#!/bin/bash
#SBATCH --output=/dev/null --requeue
date +%s.%N >>{log}
if [ "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ]; then scontrol requeue "$SLURM_JOB_ID"; sleep 60; fi
"""


def requeue() -> list[Figure]:
    if missing_programs():
        return []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        cluster = PrivateCluster.start(nodes=1, directory=Path(folder, "slurm"))
        os.environ |= cluster.environment
        try:
            alone = [_seconds(Path(folder, f"alone{i}"), helped=False) for i in range(TIMES)]
            helped = [_seconds(Path(folder, f"helped{i}"), helped=True) for i in range(TIMES)]
        finally:
            cluster.stop()
    return [
        Figure(name="requeue to next start", value=median(alone), unit="s", note="Slurm holds it for 6 s at least"),
        Figure(name="requeue to next start, resume", value=median(helped), unit="s", target=5),
    ]


def _seconds(folder: Path, *, helped: bool) -> float:
    """Time between the two starts; the first requeues at once."""
    folder.mkdir()
    log = folder / "starts"
    submit(RunDirectory(folder), SCRIPT.format(log=log))
    while not log.exists() or len(starts := log.read_text().split()) < 2:
        if helped and log.exists():
            with contextlib.suppress(LaunchError):  # not back in the queue yet
                resume(folder)
        time.sleep(0.1)
    return float(starts[1]) - float(starts[0])
