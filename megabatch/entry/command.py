"""The command line of one run: its plan and job script, its submission, or the run itself on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megabatch.config.flags import Actions
from megabatch.config.recipe import Recipe
from megabatch.entry.input_checks import in_the_way, occupied, unwritable
from megabatch.entry.launch import Launch, prepare, written
from megabatch.entry.launch_checks import faults_here, folder_faults, missing_here, require_torch
from megabatch.entry.plan_text import plan_text
from megabatch.errors import ConfigError, Fault, LaunchError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.saved.history import newest_in
from megabatch.slurm.launcher_lock import LockedError

_USAGE = """\
python {file} --submit | --local | --dry_run [--cluster NAME] [--run_dir DIR] [--<parameter> VALUE …]

  --submit    send the run to Slurm       --local    run it here, one process per rank
  --dry_run   show plan and job script    --help     all parameters
"""


def run_recipe(recipe: Recipe, actions: Actions, arguments: Sequence[str], *, recipe_file: Path) -> int:
    """Exit code. Args: `recipe` has the flags of `arguments`. Raises: MegabatchError."""

    def prepared() -> Launch:
        return _in_links(prepare(recipe, actions, recipe_file=recipe_file), actions)

    if actions.submit or actions.local:
        return start(_submit if actions.submit else _local, prepared, arguments)
    return _show(prepared(), dry_run=actions.dry_run, file=recipe_file.name)


def start(
    how: Callable[[Launch, Sequence[str]], int], prepared: Callable[[], Launch], arguments: Sequence[str]
) -> int:
    """Starts the run; retries in the next numbered folder if another launcher took this one."""
    while True:
        launch = prepared()
        try:
            return how(launch, arguments)
        except LockedError:
            if not launch.numbered:
                raise


def _in_links(launch: Launch, actions: Actions) -> Launch:
    """The run as `--chain` jobs, none of which requeues."""
    if actions.chain is None:
        return launch
    if actions.local:
        raise ConfigError([Fault("--chain", None, "is for Slurm; leave it out with --local", bare=True)])
    return replace(launch, job=replace(launch.job, links=actions.chain, requeue=False))


def _show(launch: Launch, *, dry_run: bool, file: str) -> int:
    """Prints the plan; a dry run prints it to standard error, so that standard output is only the job script."""
    from megabatch.slurm.render import render

    refusals = _checked(launch)
    script = render(launch.job, launch.profile)
    text = plan_text(launch, refusals=refusals)
    if dry_run:
        print(text, file=sys.stderr, flush=True)
        sys.stdout.write(script)
        sys.stdout.flush()
    else:
        print(f"usage: {_USAGE.format(file=file)}\n{text}")
    return ExitCode.DONE


def _checked(launch: Launch) -> list[Fault]:
    """Raises ConfigError for broken rules; returns faults that only concern what this machine lacks."""
    folder = launch.directory.path
    faults = launch.faults() + in_the_way(folder)
    if launch.model.fault is not None:
        faults.append(launch.model.fault)
    if faults:
        raise ConfigError(faults)
    return missing_here(launch, local=False) + unwritable(folder) + occupied(folder)


def _require_launchable(launch: Launch, *, local: bool = False) -> None:
    """Raises ConfigError with every fault that is visible before the run starts."""
    faults = launch.faults() + folder_faults(launch.directory.path, recipe_file=launch.recipe_file, local=local)
    # data and weights are read only when nothing else stops the run
    faults += missing_here(launch, local=local) if faults else faults_here(launch, local=local)
    if faults:
        raise ConfigError(faults)


def _submit(launch: Launch, arguments: Sequence[str]) -> int:
    _require_launchable(launch)
    return queue(launch, arguments)


def queue(launch: Launch, arguments: Sequence[str]) -> int:
    """Submits a run that may start, and prints how to watch it. Raises: LaunchError, ConfigError."""
    from megabatch.slurm.chain import forbids_requeue
    from megabatch.slurm.interrupts import held_back
    from megabatch.slurm.render import render

    script = render(launch.job, launch.profile)
    with held_back(), written(launch, arguments) as directory:
        _require_idle(directory)
        # submitit's import costs more than all the rest of a dry run
        from megabatch.slurm.chain import ChainedJob, submit_all

        if launch.code is not None:
            launch.code.store()
        name = launch.recipe.name
        jobs = submit_all(
            [ChainedJob(name=name, run=directory, script=script, links=launch.job.links)], cluster=launch.cluster
        )[name]
    folder = shlex.quote(str(directory.path))
    named = f"job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}"
    size = f"{launch.job.world_size} rank{'s' if launch.job.world_size > 1 else ''}"
    print(f"submitted {named}: {name}, {size}, in {directory.path}")
    if launch.job.requeue and forbids_requeue(jobs[0]):
        print(
            f"  note: this cluster does not let job {jobs[0]} requeue: at its time limit it saves and ends. Submit it"
        )
        print(
            "  with --chain N, which queues N jobs that each continue where the previous one stopped, or use "
            "megabatch resume"
        )
    print(f"  megabatch status {folder}")
    print(f"  megabatch logs -f {folder}")
    print(f"  megabatch cancel {folder}")
    return ExitCode.DONE


def _require_idle(directory: RunDirectory) -> None:
    from megabatch.slurm.queue import State
    from megabatch.slurm.state import status_now

    now = status_now([directory.path])[0]
    job = f"job {now.job_id}" if now.job_id else "a run"
    if now.state is State.RUNNING and now.reason:
        raise LaunchError(f"{directory.path}: {job} is {now.reason}; submit it again once that has ended")
    if now.state.active:
        raise LaunchError(f"{directory.path}: {job} is {now.state} there already; cancel it first, or use --run_dir")


def _local(launch: Launch, arguments: Sequence[str]) -> int:
    from megabatch.slurm.local import run_local

    _require_launchable(launch, local=True)
    require_torch()
    with written(launch, arguments) as directory:
        _require_idle(directory)
        print(plan_text(launch, refusals=[], local=True), flush=True)
        code = run_local(launch.job, launch.profile)
    _report_end(directory, code, arguments)
    return code


def _report_end(directory: RunDirectory, code: int, arguments: Sequence[str]) -> None:
    if code == ExitCode.DONE:
        newest = newest_in(directory.checkpoints)
        print(f"done: {directory.path}\n  metrics      {directory.metrics}\n  checkpoint   {newest}")
        if newest is not None and (newest / "hf").is_dir():
            print(f"  Hugging Face {newest / 'hf'}")
    elif code == ExitCode.REQUEUE:
        given = any(argument.startswith(("--run_dir", "--run-dir")) for argument in arguments)
        where = [] if given else ["--run_dir", str(directory.path)]
        again = shlex.join(["python", sys.argv[0], *arguments, *where])
        print(f"stopped and saved; resume with: {again}")
    else:
        print(f"error: the run failed with exit code {code}; all logs are in {directory.logs}", file=sys.stderr)
