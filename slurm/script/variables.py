"""Modules and the environment that every rank inherits."""

from __future__ import annotations

import functools
import re
import textwrap

from megabatch.config.rules.secrets import no_secrets_in_words
from megabatch.errors import LaunchError
from megabatch.secret_text import secret_given, secrets_in_words
from megabatch.slurm.environment import Variable
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import shell

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_words(job: JobSpec) -> None:
    """Raises: LaunchError for a secret among the words of the job's command; roles look at theirs themselves."""
    if faults := list(no_secrets_in_words("the command", job.program or job.arguments or ())):
        raise LaunchError("; ".join(map(str, faults)))


def check_names(variables: list[Variable], inherit: tuple[str, ...]) -> None:
    for name in (*(v.name for v in variables), *inherit):
        if not _NAME.fullmatch(name):
            raise LaunchError(f"environment variable {name!r} is not a name that a shell can export; rename it")
    for variable in variables:
        if secret_given(variable.name, variable.value) or any(secrets_in_words([variable.value])):
            raise LaunchError(
                f"environment.{variable.name} looks like a secret, and job scripts are readable by others; export it "
                f"in the shell that submits and list its name under `inherit`"
            )


_FIND_MODULES = """\
for init in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /usr/share/lmod/lmod/init/bash; do
    if ! type module >/dev/null 2>&1 && [ -r "$init" ]; then . "$init" || true; fi
done""".splitlines()


def modules(profile: ClusterProfile) -> list[str]:
    """Finds `module`, which a batch shell may lack, runs the site's own lines (`module use …`), and loads."""
    needed = profile.modules or any("module" in line for line in profile.setup)
    load = [f"module load {' '.join(map(shell, profile.modules))}"] if profile.modules else []
    return [*(_FIND_MODULES if needed else []), *profile.setup, *load]


def environment(
    job: JobSpec, variables: list[Variable], inherit: tuple[str, ...], *, contained: bool = False
) -> list[str]:
    """Exports; the host's own packages are not for a container's Python."""
    lines: list[str] = []
    for variable in variables:
        if not variable.node_local:
            lines += [*comment(variable.reason), f"export {variable.name}={shell(variable.value)}"]
    if job.snapshot is not None:
        path = shell(str(job.snapshot))
        hosts = "" if contained else '"${PYTHONPATH:+:$PYTHONPATH}"'
        lines += ["# the code as it was at submission", f"export PYTHONPATH={path}{hosts}"]
    for name in inherit:
        lines.append(f'[ -n "${{{name}+set}}" ] || echo "megabatch: {name} is not set in the submitting shell" >&2')
    if job.cpus_per_task is not None:
        lines += [
            "# sbatch's --cpus-per-task does not reach srun by itself",
            f"export SRUN_CPUS_PER_TASK={job.cpus_per_task}",
        ]
    return [
        *lines,
        f"export WORLD_SIZE={job.world_size} LOCAL_WORLD_SIZE={job.tasks_per_node}",
    ]


@functools.cache
def comment(text: str) -> tuple[str, ...]:
    return tuple(textwrap.wrap(text, width=118, initial_indent="# ", subsequent_indent="# "))
