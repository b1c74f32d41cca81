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
_OWN = re.compile(r"(MEGABATCH_(?!CACHE$)|APPTAINERENV_|BASH).*|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)")
"""Variables by which the script and the ranks communicate."""
_SHELLS = (
    "IFS SHELLOPTS UID EUID PPID GROUPS PWD OLDPWD REPLY MAPFILE PIPESTATUS SECONDS EPOCHSECONDS EPOCHREALTIME RANDOM "
    "SRANDOM LINENO FUNCNAME DIRSTACK OPTIND OPTARG OPTERR TMOUT CDPATH GLOBIGNORE EXECIGNORE POSIXLY_CORRECT"
)
"""Variables that bash itself sets, or that change how it reads a script."""


def check_words(job: JobSpec) -> None:
    """Raises: LaunchError for a secret in the job's command; roles check their own commands."""
    if faults := list(no_secrets_in_words("the command", job.program or job.arguments or ())):
        raise LaunchError("; ".join(map(str, faults)))


def check_names(variables: list[Variable], inherit: tuple[str, ...]) -> None:
    """Raises: LaunchError listing every invalid name, every name that the user may not set, and every secret."""
    for name in (*(v.name for v in variables), *inherit):
        if not _NAME.fullmatch(name):
            raise LaunchError(f"environment variable {name!r} is not a name that a shell can export; rename it")
    refused = [f"environment.{variable.name} {rule}" for variable in variables if (rule := _refusal(variable))]
    if refused:
        raise LaunchError("; ".join(refused))


@functools.lru_cache(maxsize=1024)  # most are the same for all runs of a sweep
def _refusal(variable: Variable) -> str | None:
    """Why the user may not set this variable; None if allowed. The script's own variables are in lower case."""
    name = variable.name
    if name.startswith(("SLURM", "SRUN_", "SBATCH_")):
        return "is Slurm's own variable; its options go under `srun` and `sbatch` of the cluster profile"
    if _OWN.fullmatch(name) or name in _SHELLS.split():
        return "is set by the job script itself; remove it"
    if name == name.lower() and not name.endswith("_proxy"):
        return "is lower-case, like the job script's own variables; use an upper-case name"
    if name == "PATH" and "$" in variable.value:
        return "contains a $ that nothing expands; list only your folders: they precede the node's own PATH"
    if secret_given(name, variable.value) or any(secrets_in_words([variable.value])):
        return (
            "looks like a secret, but others can read job scripts; export it in the submitting shell and "
            "list its name under `inherit`"
        )
    return None


_FIND_MODULES = """\
for init in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /usr/share/lmod/lmod/init/bash; do
    if ! type module >/dev/null 2>&1 && [ -r "$init" ]; then . "$init" || true; fi
done""".splitlines()


def modules(profile: ClusterProfile) -> list[str]:
    """Finds `module`, which a batch shell may lack, runs the site's own lines (`module use …`), and loads."""
    needed = profile.modules or any("module" in line for line in profile.setup)
    load = [f"module load {' '.join(map(shell, profile.modules))}"] if profile.modules else []
    return [*(_FIND_MODULES if needed else []), *profile.setup, *load]


def environment(job: JobSpec, variables: list[Variable], inherit: tuple[str, ...]) -> list[str]:
    """What the batch script exports."""
    lines: list[str] = []
    for variable in variables:
        if not variable.node_local:
            # without the node's own PATH the script could not find the programs that it calls
            rest = '"${PATH:+:$PATH}"' if variable.name == "PATH" else ""
            lines += [*comment(variable.reason), f"export {variable.name}={shell(variable.value)}{rest}"]
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
