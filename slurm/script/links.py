"""The first act of a job that is one of several links of a run: whether there is anything left to do."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.quoting import shell


def earlier_links(job: JobSpec) -> list[str]:
    """Ends the job with the run's own exit code if an earlier link has finished it, or failed in a way that stays."""
    if job.links == 1:
        return []
    again = " | ".join(str(code.value) for code in (ExitCode.REQUEUE, ExitCode.CRASHED, ExitCode.HUNG))
    return [
        "# what the links before this one came to: the last end since the last submission",
        "ended=",
        "while read -r line; do",
        "    case $line in",
        "        *'\"cluster\"'*) ended= ;;",
        "        *'\"exit_code\": '*) ended=${line#*'\"exit_code\": '} ended=${ended%%[!0-9]*} ;;",
        "    esac",
        f"done <{shell(str(job.files.jobs))} || true",
        "# after a stop with everything saved, a crash, a hang or a death by a signal this link goes on",
        f'case "$ended" in "" | {again} | 129 | 1[3-9]? | 2??) ;; *)',
        '    echo "megabatch: an earlier job of this run ended with exit code $ended: nothing to go on with"',
        '    exit "$ended" ;;',
        "esac",
    ]
