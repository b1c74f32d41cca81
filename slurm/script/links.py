"""The first act of a job that is one of several links of a run: whether there is anything left to do."""

from __future__ import annotations

import re

from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.slurm.job import JobSpec
from megabatch.slurm.quoting import shell
from megabatch.slurm.script.exit_codes import MAY_PASS

_NOTHING_LEFT = "nothing left to do"
_START = re.compile(r"^(?=export MEGABATCH_RUN=)", re.MULTILINE)
_OPTION = re.compile(r"^#SBATCH --(?:no-)?requeue$", re.MULTILINE)
_WITHOUT = re.compile(
    r'(?<=^if \[ "\$verdict" = exclude \] && \[ -z "\$stop" \]; then )(?:leave_out|verdict=fail)(?=; fi$)',
    re.MULTILINE,
)
_END = re.compile(r"^(?=exit \"\$status\"\n\Z)", re.MULTILINE)
_ENDING = re.compile(r"^# after TERM, and once Slurm .*^fi\n(?=exit \"\$status\"\n\Z)", re.MULTILINE | re.DOTALL)
"""The line of a script that says whether its job requeues."""


def earlier_links(job: JobSpec) -> list[str]:
    """Ends the job with the run's own exit code if an earlier link finished the run or failed for good."""
    return [] if job.links == 1 else _look(job.files)


def last_link(job: JobSpec) -> list[str]:
    """If the run is not done, its last job prints how to continue."""
    return [] if job.links == 1 else _last(job.files)


def _last(run: RunDirectory) -> list[str]:
    resume = f"megabatch resume {shell(str(run.path))} --chain N"
    return [
        "# jobs that were queued after this one go on with the run",
        'later=$(awk -F \'"\' -v own="$MEGABATCH_JOB_ID" \\',
        """    '/"cluster": / { if (found) print $4; if ($4 == own) found = 1 }' \\""",
        '    "$MEGABATCH_RUN/jobs.jsonl") || true',
        f'case "$status:$later" in {ExitCode.REQUEUE}: | {": | ".join(MAY_PASS.split(" | "))}:)',
        "    echo "
        + shell(f"megabatch: the last of this run's jobs has ended but the run is not done; resume with: {resume}"),
        "    ;;",
        "esac",
    ]


def is_linked(script: str) -> bool:
    """Whether a stored script is one of a run in several jobs."""
    return _NOTHING_LEFT in script


def linked(script: str, run: RunDirectory) -> str:
    """Turns a run's stored script into the one that `render` makes for links; their number does not matter.

    Raises: LaunchError for a script that was not written by `render`.
    """
    if is_linked(script):
        return script
    requeues = "\n#SBATCH --requeue\n" in script
    last = "\n".join(_last(run)) + "\n"
    changes = (
        (_START, 1, "\n".join(_look(run)) + "\n\n"),
        (_OPTION, 1, "#SBATCH --no-requeue"),
        (_WITHOUT, int("\nleave_to_next_link() {\n" in script), "leave_to_next_link"),
        (_ENDING, int(requeues), last),
        *([] if requeues else [(_END, 1, last)]),
    )
    for pattern, expected, text in changes:
        pieces = pattern.split(script)
        if len(pieces) != expected + 1:
            raise LaunchError(f"{run.script} is not as it was written; submit its recipe again with --chain N instead")
        script = text.join(pieces)
    return script


def _look(run: RunDirectory) -> list[str]:
    return [
        "# what the links before this one came to: the last end since the last submission",
        "ended=",
        "while read -r line; do",
        "    case $line in",
        "        *'\"cluster\"'*) ended= ;;",
        "        *'\"exit_code\": '*) ended=${line#*'\"exit_code\": '} ended=${ended%%[!0-9]*} ;;",
        "    esac",
        f"done <{shell(str(run.jobs))} || true",
        "# after a stop with everything saved, a crash, a hang or a death by a signal this link goes on",
        f'case "$ended" in "" | {ExitCode.REQUEUE} | {MAY_PASS}) ;; *)',
        '    echo "megabatch: an earlier job of this run ended with exit code $ended: ' + f'{_NOTHING_LEFT}"',
        '    exit "$ended" ;;',
        "esac",
    ]
