"""Inputs that a job reads from earlier jobs: fixed at its first attempt, checked at each."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.quoting import shell


def inputs(job: JobSpec) -> list[str]:
    """Fixes the checkpoints that this run starts from, and ends the run with a clear message if an input is missing.

    A requeued or resubmitted run reads its first inputs again, even if the run that made them has continued.
    """
    if not job.inputs:
        return []
    lines = [*_MISSING]
    for item in job.inputs:
        if item.run is not None and item.link is not None:
            checkpoints, link = shell(str(item.run / "checkpoints")), shell(str(item.link))
            lines += [
                f"if [ ! -L {link} ]; then",
                f"    step=$(cat -- {checkpoints}/latest) || missing_input {checkpoints}/latest",
                f'    case "$step" in "" | .* | */*) missing_input {checkpoints}/latest ;; esac',
                "    # a run that was killed while it saved may have named a checkpoint that is not there yet",
                f'    if [ ! -d {checkpoints}/"$step" ]; then',
                f"        for one in {checkpoints}/step_{'[0-9]' * 8}; do step=${{one##*/}}; done",
                "    fi",
                f'    [ -d {checkpoints}/"$step" ] || missing_input {checkpoints}/"$step"',
                f"    mkdir -p -- {shell(str(item.link.parent))}",
                f'    ln -sfn -- {checkpoints}/"$step" {link}',
                "fi",
            ]
        path = shell(str(item.path))
        lines.append(f"[ -e {path} ] || missing_input {path}")
    return lines


_MISSING = f"""\
# what this job reads of earlier ones; a checkpoint is chosen once, at the first attempt
missing_input() {{
    echo "megabatch: input missing: $1" >&2
    record_ending {ExitCode.CONFIG}
    exit {ExitCode.CONFIG}
}}""".splitlines()
