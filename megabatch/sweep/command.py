"""A sweep's command line: its table, and then its arrays, its runs on this machine, or no more."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megabatch.config.flags import Actions, Named, named
from megabatch.config.recipe import Recipe
from megabatch.entry.launch_checks import faults_here, folder_faults, missing_here
from megabatch.errors import ConfigError, Fault
from megabatch.run_directory import ExitCode
from megabatch.slurm.array import JobArray, array_directives, expected_start, render_array
from megabatch.slurm.queue import State
from megabatch.slurm.render import render
from megabatch.sweep.candidates import Candidates, candidates
from megabatch.sweep.declaration import require_declaration
from megabatch.sweep.declare import Sweep
from megabatch.sweep.folder import describe, other_runs
from megabatch.sweep.submission import arrays_of, left_alone, submit_arrays
from megabatch.sweep.table import table_text

_USAGE = """\
python {file} --submit | --local | --dry_run [--cluster NAME] [--run_dir DIR] [--max_parallel N]
    [--sweep <parameter>=VALUE,VALUE …] [--<parameter> VALUE …]

  --submit    send the runs to Slurm, one job array for each job size  --local    run them here
  --dry_run   show the table and the arrays' scripts                   --help     all parameters
"""


def run_sweep(sweep: Sweep, recipe: Recipe, actions: Actions, arguments: Sequence[str], *, recipe_file: Path) -> int:
    """Exit code of a sweep's command line; `recipe` is the sweep's own with the flags. Raises: MegabatchError."""
    require_declaration(sweep)
    _refuse_swept_flags(sweep, recipe, actions, arguments)
    if actions.chain is not None:
        raise ConfigError(
            [Fault("--chain", actions.chain, "is for a single run; runs of a sweep come back by requeueing")]
        )
    found = candidates(sweep, recipe, actions, recipe_file=recipe_file)
    left = left_alone(found)
    if actions.local:
        return _local(found, left, arguments)
    arrays = arrays_of(found, [c for c in found.kept if c.point.name not in left])
    starts = _starts(found, arrays)
    text = table_text(found, arrays=arrays, starts=starts, left=left)
    if actions.submit:
        print(text, flush=True)
        return _submit(found, arrays, left, arguments)
    remarks = [f"refused here: {fault}" for fault in (*_unbuilt(found), *_missing(found), *other_runs(found))]
    if actions.dry_run:
        print("\n".join([text, *remarks]), file=sys.stderr, flush=True)
        sys.stdout.write("\n".join(_scripts(found, arrays)))
    else:
        print("\n".join([f"usage: {_USAGE.format(file=recipe_file.name)}", text, *remarks]))
    _require_one(found)
    return ExitCode.DONE


def _refuse_swept_flags(sweep: Sweep, recipe: Recipe, actions: Actions, arguments: Sequence[str]) -> None:
    """A flag for a swept parameter would change nothing. Raises: ConfigError."""
    swept = {*sweep.grid, *sweep.zip, *(name for row in sweep.list for name in row)}
    swept |= {text.partition("=")[0] for text in actions.sweep}
    dotted = {one.parameter.dotted for name in swept if isinstance(one := named(name, recipe), Named)}
    faults = []
    for argument in arguments:
        flag = argument.removeprefix("--").partition("=")[0]
        found = named(flag, recipe) if argument.startswith("--") else None
        if isinstance(found, Named) and found.parameter.dotted in dotted:
            rule = "is swept, so a single value has no effect"
            faults.append(Fault(f"--{flag}", None, rule, try_=(f"--sweep {flag}=VALUE",), bare=True))
    if faults:
        raise ConfigError(faults)


def _submit(found: Candidates, arrays: Sequence[JobArray], left: Mapping[str, str], arguments: Sequence[str]) -> int:
    _require_launchable(found)
    if not arrays:
        print(_nothing_to_submit(left))
        return ExitCode.DONE
    ids = submit_arrays(found, arrays, arguments)
    for array, job_id in zip(arrays, ids, strict=True):
        count = len(array.jobs)
        print(f"submitted job array {job_id}: {count} run{'s' * (count > 1)}, from {array.folder}")
    _tell_left(left)
    folder = shlex.quote(str(found.folder))
    print(f"  megabatch sweep show {folder}\n  megabatch status {folder}")
    return ExitCode.DONE


def _nothing_to_submit(left: Mapping[str, str]) -> str:
    active = {name: why for name, why in left.items() if why != State.COMPLETED}
    if not active:
        return "nothing was submitted: nothing is missing or failed"
    head = "nothing was submitted: nothing is missing or failed, but these have not ended"
    tail = "once they have ended, the same command submits those that are not done"
    return "\n".join([head, *(f"  {name}: {why}" for name, why in active.items()), tail])


def _tell_left(left: Mapping[str, str]) -> None:
    for name, why in left.items():
        print(f"  left alone: {name}, {why}")


def _local(found: Candidates, left: Mapping[str, str], arguments: Sequence[str]) -> int:
    from megabatch.sweep.local import run_here

    print(table_text(found, arrays=(), starts={}, left=left), flush=True)
    _require_launchable(found, local=True)
    describe(found)
    _tell_left(left)
    return run_here(found, [c for c in found.kept if c.point.name not in left], arguments)


def _require_launchable(found: Candidates, *, local: bool = False) -> None:
    """Raises ConfigError with every fault that is visible before the runs start."""
    _require_one(found)
    if others := other_runs(found):
        fix = "nothing was submitted; give the sweep another name or --run_dir, or remove those folders"
        raise ConfigError("\n  ".join([f"{len(others)} folders hold other runs, {fix}", *others]))
    own = {"arrays", "cache", *(candidate.point.name for candidate in found.all)}
    faults = [*_unbuilt(found), *folder_faults(found.folder, recipe_file=found.base.recipe_file, local=local, own=own)]
    asked = missing_here if faults else faults_here
    faults += _once(fault for c in found.distinct_inputs() for fault in asked(c.launch, local=local))
    if faults:
        raise ConfigError(faults)


def _require_one(found: Candidates) -> None:
    if not found.kept:
        reasons = dict.fromkeys(candidate.pruned for candidate in found.all)
        raise ConfigError([Fault("every point is pruned:", None, reason, bare=True) for reason in reasons])


def _unbuilt(found: Candidates) -> list[Fault]:
    return _once(fault for candidate in found.kept for fault in candidate.unbuilt)


def _missing(found: Candidates) -> list[Fault]:
    return _once(fault for c in found.distinct_inputs() for fault in missing_here(c.launch, local=False))


def _once(faults: Iterable[Fault]) -> list[Fault]:
    return list({str(fault): fault for fault in faults}.values())


def _starts(found: Candidates, arrays: Sequence[JobArray]) -> dict[str, str]:
    """When Slurm would start each point's run; asks once per array, and only if Slurm is installed."""
    if shutil.which("sbatch") is None:
        return {}
    starts: dict[str, str] = {}
    for array in arrays:
        when = expected_start("\n".join(array_directives(array, found.base.profile)) + "\n")
        if when is not None:
            starts |= {job.run_directory.name: when for job in array.jobs}
    return starts


def _scripts(found: Candidates, arrays: Sequence[JobArray]) -> list[str]:
    """The scripts for sbatch, each followed by the job script of its first element."""
    texts = []
    for array in arrays:
        scripts = [render(job, found.base.profile) for job in array.jobs]
        texts.append(render_array(array, found.base.profile, scripts=scripts))
        texts.append(f"# {array.jobs[0].files.script}, and so for each run:\n{scripts[0]}")
    return texts
