"""The first act of a job that is one of several links of a run: whether there is anything left to do."""

from __future__ import annotations

import re

from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.slurm.job import JobSpec
from megabatch.slurm.quoting import shell

_NOTHING_LEFT = "nothing to go on with"
_RUN = re.compile(r"^export MEGABATCH_RUN=", re.MULTILINE)
_REQUEUES = (
    (re.compile(r"^#SBATCH --requeue$", re.MULTILINE), "#SBATCH --no-requeue"),
    (
        re.compile(r'^(if \[ "\$verdict" = exclude .* then) (?:leave_out|verdict=fail); fi$', re.MULTILINE),
        r"\1 leave_to_next_link; fi",
    ),
    (re.compile(r"^# after TERM, and once Slurm .*^fi\n(?=exit \"\$status\"\n\Z)", re.MULTILINE | re.DOTALL), ""),
)
"""Where a script says that its job comes back, and what it says where the job does not."""


def earlier_links(job: JobSpec) -> list[str]:
    """Ends the job with the run's own exit code if an earlier link has finished it, or failed in a way that stays."""
    return [] if job.links == 1 else _look(job.files)


def is_linked(script: str) -> bool:
    """Whether a stored script is one of a run in several jobs."""
    return _NOTHING_LEFT in script


def linked(script: str, run: RunDirectory) -> str:
    """A run's stored script as `render` makes it for several links, whatever their number.

    Raises: LaunchError for one that was written otherwise.
    """
    if is_linked(script):
        return script
    place = _RUN.search(script)
    if place is None:
        raise LaunchError(f"{run.script} is not as it was written; submit its recipe again with --chain N instead")
    script = f"{script[: place.start()]}{chr(10).join(_look(run))}\n\n{script[place.start() :]}"
    for pattern, instead in _REQUEUES:
        script = pattern.sub(instead, script)
    return script


def _look(run: RunDirectory) -> list[str]:
    again = " | ".join(str(code.value) for code in (ExitCode.REQUEUE, ExitCode.CRASHED, ExitCode.HUNG))
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
        f'case "$ended" in "" | {again} | 129 | 1[3-9]? | 2??) ;; *)',
        '    echo "megabatch: an earlier job of this run ended with exit code $ended: ' + f'{_NOTHING_LEFT}"',
        '    exit "$ended" ;;',
        "esac",
    ]
