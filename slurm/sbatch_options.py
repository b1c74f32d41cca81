"""Which of sbatch's options a cluster profile may set: all but those that the job script depends on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megabatch.errors import Fault

_NODES = "resources.nodes and resources.tasks_per_node"
_GPUS = "resources.gpus_per_node, and `gpu_request` and `gpu_type` for how they are requested"
_CPUS = "resources.cpus_per_task"
_LOGS = "nothing: logs are in the run directory"
_VARIABLES = "`environment`, and `inherit` for secrets"
_CALL = "nothing: it is for calling sbatch by hand"
_INSTEAD = {
    "array": "nothing: sweeps are arrays",
    "chdir": "nothing: jobs run where they are submitted",
    "cpus-per-gpu": _CPUS,
    "cpus-per-task": _CPUS,
    "dependency": "a chain's `after`",
    "error": _LOGS,
    "export": _VARIABLES,
    "export-file": _VARIABLES,
    "gpus": _GPUS,
    "gpus-per-node": _GPUS,
    "gpus-per-socket": _GPUS,
    "gpus-per-task": _GPUS,
    "help": _CALL,
    "job-name": "resources.job_name",
    "kill-on-invalid-dep": "nothing: chains rely on it",
    "no-requeue": "resources.requeue",
    "nodefile": "`nodelist` for the names, " + _NODES,
    "nodes": _NODES,
    "ntasks": _NODES,
    "ntasks-per-core": _NODES,
    "ntasks-per-gpu": _NODES,
    "ntasks-per-node": _NODES,
    "ntasks-per-socket": _NODES,
    "ntasks-per-tres": _NODES,
    "open-mode": _LOGS,
    "output": _LOGS,
    "parsable": _CALL,
    "quiet": _CALL,
    "requeue": "resources.requeue",
    "signal": "resources.signal_delay_s",
    "test-only": _CALL,
    "time": "`time` of the profile, or resources.time",
    "tres-per-task": f"{_CPUS} and {_GPUS}",
    "usage": _CALL,
    "version": _CALL,
    "wait": _CALL,
    "wrap": "`setup` for lines of bash",
}
"""Options that the script depends on, each with the setting that controls it."""
_FIELDS = ("partition", "account", "qos", "constraint", "reservation", "exclude")
"""Options that are also fields of a profile."""
_NAME = re.compile(r"[a-z][a-z-]*")
_DIRECTIVE = re.compile(r"^#SBATCH --([a-z-]+)", re.MULTILINE)
_SPELLED_OTHERWISE = {"timelimit": "time", "array-inx": "array", "mem-per-node": "mem"}
"""Options whose SBATCH_ variable has another name."""


def sbatch_faults(profile: Mapping[str, Any], *, file: object) -> Iterator[Fault]:
    """Faults of a profile's TOML table `sbatch`; they name `file`."""
    options = profile.get("sbatch")
    for name, value in options.items() if isinstance(options, dict) else ():
        place = f"cluster.sbatch.{name}"
        if not _NAME.fullmatch(name):
            near = [dashed] if _NAME.fullmatch(dashed := name.lower().replace("_", "-")) else []
            rule = f"in {file} is not the name of an sbatch option: lower-case letters and dashes"
            yield Fault(repr(place) if not name.isprintable() else place, None, rule, near, bare=True)
        elif instead := _set_by(name, value):
            yield Fault(place, None, f"in {file} is reserved for the job script; set {instead}", bare=True)
        elif name in _FIELDS and profile.get(name) is not None:
            yield Fault(place, None, f"in {file} is set twice; keep cluster.{name}", bare=True)


def _set_by(name: str, value: object) -> str | None:
    """For one of the script's own options, the setting that controls it; sbatch also accepts abbreviations."""
    parts = str(value).lower().split(",")
    if "gres".startswith(name) and any(re.match(r"(gres[:/])?gpu\b", part.strip()) for part in parts):
        return _GPUS
    if "distribution".startswith(name) and not re.match(r"(block|\*)(:|,|$)", parts[0]):
        return "nothing: ranks are placed on nodes in blocks"
    return next((instead for own, instead in _INSTEAD.items() if own.startswith(name)), None)


def overriding(names: Iterable[str], script: str) -> set[str]:
    """The sbatch variables (`SBATCH_TIMELIMIT`) that would silently override the script's directives."""
    said = set(_DIRECTIVE.findall(script))
    return {name for name in names if name.startswith("SBATCH_") and _option(name) in said | _INSTEAD.keys()}


def _option(variable: str) -> str:
    name = variable.removeprefix("SBATCH_").lower().replace("_", "-")
    return _SPELLED_OTHERWISE.get(name, name)
