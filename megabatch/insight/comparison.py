"""How two runs differ: what was asked for, what was derived from it, environment, code and script."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megabatch.insight.overview import run_json
from megabatch.run_directory import RunDirectory
from megabatch.slurm.records import LOCAL, read_records
from megabatch.slurm.snapshot import read_snapshot
from megabatch.slurm.state import read_heartbeat
from megabatch.values import dataclass

Differences = dict[str, tuple[Any, Any]]
"""Both values by dotted name; None for a missing one."""
_EXPORT = re.compile(r"^\s*export ([A-Za-z_]\w*)=(.*)$")
_SNAPSHOT = "MEGABATCH_CODE"
_OF_THE_RUN = {"MEGABATCH_RUN", _SNAPSHOT}
"""Exports that differ between any two runs, or that the code section shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Differences between two runs; ignores a run's own folder everywhere."""

    config: Differences
    """Fields of the recipe."""
    derived: Differences
    """The model's shape and the layout, derived from the recipe and the model's files."""
    environment: Differences
    """The script's exports, the versions and paths in run.json, and the versions of the newest ranks."""
    code: tuple[str, ...]
    """Files whose content differs, or that only one snapshot has (`+` the second, `-` the first)."""
    code_note: str
    """Why code was not compared; empty when it was."""
    script: tuple[str, ...]
    """Unified diff of the rest of the job script."""

    @property
    def same(self) -> bool:
        return not (self.config or self.derived or self.environment or self.code or self.script)

    def plain(self) -> dict[str, object]:
        """For JSON: the keys that docs/inspecting.md lists."""
        both = {name: getattr(self, name) for name in ("config", "derived", "environment")}
        return {
            **{name: {field: list(values) for field, values in found.items()} for name, found in both.items()},
            "code": list(self.code),
            "code_note": self.code_note,
            "script": list(self.script),
        }


def compare(a: Path, b: Path) -> Comparison:
    """Compares two run directories."""
    configs = [_placeless(run_json(run), run) for run in (a, b)]
    scripts = [_script(run) for run in (a, b)]
    exports = [_exports(script) for script in scripts]
    snapshots = [_snapshot(exported.get(_SNAPSHOT)) for exported in exports]
    derived = [{name: config.get(name) for name in ("shape", "layout")} for config in configs]
    kept = [
        _placeless({k: v for k, v in exported.items() if k not in _OF_THE_RUN}, run)
        for exported, run in zip(exports, (a, b), strict=True)
    ]
    environment = [
        exported | {f"provenance.{name}": value for name, value in _provenance(config).items()} | versions
        for exported, config, versions in zip(kept, configs, _versions(a, b), strict=True)
    ]
    code, note = _code(*snapshots, local=[_is_local(run) for run in (a, b)])
    return Comparison(
        config=_differences(*(dict(flat(config.get("recipe"))) for config in configs)),
        derived=_differences(*(dict(flat(values)) for values in derived)),
        environment=_differences(*environment),
        code=code,
        code_note=note,
        script=tuple(_script_diff(*scripts, a=a, b=b)),
    )


def code_diff(a: Path, b: Path) -> Iterator[str]:
    """Unified diff of all files that differ between the two runs' snapshots; empty if a run has no snapshot."""
    before, after = (_snapshot(_exports(_script(run)).get(_SNAPSHOT)) for run in (a, b))
    if before is None or after is None:
        return
    for name in sorted(before.keys() | after.keys()):
        old, new = _text(before.get(name, b"")), _text(after.get(name, b""))
        if old != new:
            yield from difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", lineterm="")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Differences:
    names = [*a, *(name for name in b if name not in a)]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and the values at the leaves; lists are leaves."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, value


def _placeless(value: Any, run: Path) -> Any:
    """Replaces the run's own folder by RUN."""
    if isinstance(value, str):
        return value.replace(str(run.absolute()), "RUN")
    if isinstance(value, list):
        return [_placeless(one, run) for one in value]
    if isinstance(value, dict):
        return {name: _placeless(one, run) for name, one in value.items()}
    return value


def _provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    said = config.get("provenance")
    left_out = ("created", "arguments", "recipe_file", "model", "id")
    return {k: v for k, v in said.items() if k not in left_out} if isinstance(said, dict) else {}


def _versions(a: Path, b: Path) -> list[dict[str, Any]]:
    """Versions on rank 0 of each run's newest attempt; empty if one of the two has not started."""
    said = [read_heartbeat(RunDirectory(run)).get("versions") for run in (a, b)]
    both = [{f"versions.{k}": v for k, v in one.items()} for one in said if isinstance(one, dict)]
    return both if len(both) == 2 else [{}, {}]


def _script(run: Path) -> list[str]:
    try:
        text = RunDirectory(run).script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()


def _exports(script: list[str]) -> dict[str, str]:
    found = {}
    for line in script:
        match = _EXPORT.match(line)
        if match:
            try:
                words = shlex.split(match[2])
            except ValueError:
                words = [match[2]]
            found[match[1]] = words[0] if words else ""
    return found


def _snapshot(path: str | None) -> Mapping[str, bytes] | None:
    """The snapshot's files by name, if it still exists."""
    try:
        return read_snapshot(Path(path)) if path else None
    except OSError:
        return None


def _is_local(run: Path) -> bool:
    jobs = read_records(RunDirectory(run))
    return not jobs or jobs[-1].job_id == LOCAL


def _code(
    before: Mapping[str, bytes] | None, after: Mapping[str, bytes] | None, *, local: list[bool]
) -> tuple[tuple[str, ...], str]:
    if before is None or after is None:
        which = "the first" if before is None else "the second"
        why = (
            "ran on this machine, from the checkout" if local[0 if before is None else 1] else "has lost its snapshot"
        )
        return (), f"not compared: {which} run {why}"
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            found.append(f"{'+' if name in after else '-'} {name}")
        elif before[name] != after[name]:
            found.append(name)
    return tuple(found), ""


def _text(content: bytes) -> list[str]:
    return content.decode(errors="replace").splitlines()


def _script_diff(before: list[str], after: list[str], *, a: Path, b: Path) -> Iterator[str]:
    """Leaves out exports, which are compared by name, and the comments above them."""
    if before and after:
        old, new = (
            [_placeless(line, run) for line in script if not _EXPORT.match(line) and not line.startswith("# ")]
            for script, run in ((before, a), (after, b))
        )
        names = str(RunDirectory(a).script), str(RunDirectory(b).script)
        yield from difflib.unified_diff(old, new, names[0], names[1], lineterm="", n=1)
