"""What a job reads of earlier jobs: named at its first start, and looked for at each."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.quoting import shell


def inputs(job: JobSpec) -> list[str]:
    """Fixes the checkpoints that this run begins from, and ends it with a clear message where something is missing.

    A run that comes back, or is submitted again, reads what it read at first, also when its input's maker goes on.
    """
    if not job.inputs:
        return []
    lines = ["# what this job reads of earlier ones; a checkpoint is chosen once, at the first start"]
    for item in job.inputs:
        if item.run is not None and item.link is not None:
            latest, link = shell(str(item.run / "checkpoints" / "latest")), shell(str(item.link))
            lines += [
                f"if [ ! -L {link} ]; then",
                f"    if ! step=$(cat -- {latest}); then",
                '        echo "megabatch: input missing: no checkpoint was saved" >&2',
                f"        exit {ExitCode.CONFIG}",
                "    fi",
                f"    mkdir -p -- {shell(str(item.link.parent))}",
                f'    ln -sfn -- {shell(str(item.run / "checkpoints"))}/"$step" {link}',
                "fi",
            ]
        lines += [
            f"if [ ! -e {shell(str(item.path))} ]; then",
            f"    echo {shell(f'megabatch: input missing: {item.path}')} >&2",
            f"    exit {ExitCode.CONFIG}",
            "fi",
        ]
    return lines
