"""The command line of a chain file, and `megabatch chain`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megabatch.chain.declare import Chain
from megabatch.chain.flags import parsed
from megabatch.chain.graph_text import graph_table, state_table
from megabatch.chain.ready import ReadyChain, make_ready
from megabatch.chain.record import recorded_chain, states
from megabatch.entry.launch_checks import require_torch
from megabatch.run_directory import ExitCode
from megabatch.table import table

_USAGE = """\
python {file} --submit | --local | --dry_run [--cluster NAME] [--run_dir DIR] [--<step>.<parameter> VALUE …]

  --submit    send the steps to Slurm     --local    run them here, one after the other
  --dry_run   show graph and job scripts
"""


def run(chain: Chain, arguments: Sequence[str], *, file: Path) -> int:
    """Exit code of a chain file's command line. Raises: MegabatchError."""
    if "--help" in arguments or "-h" in arguments:
        print(f"usage: {_USAGE.format(file=file.name)}")
        return ExitCode.DONE
    actions, chosen = parsed(chain, arguments)
    ready = make_ready(chosen, actions, file=file)
    if actions.submit:
        return _submit(ready, arguments)
    if actions.local:
        from megabatch.chain.local import run_chain

        if any(one.launch for one in ready.steps):
            require_torch()
        code = run_chain(ready, arguments)
        print(f"{'done' if code == 0 else f'ended with exit code {code}'}: {ready.folder}")
        return code
    return _show(ready, scripts=actions.dry_run)


def _submit(ready: ReadyChain, arguments: Sequence[str]) -> int:
    from megabatch.chain.submission import submit_chain
    from megabatch.slurm.chain import forbids_requeue

    ids = submit_chain(ready, arguments)
    folder = shlex.quote(str(ready.folder))
    if not ids:
        print(f"nothing to submit: every step in {ready.folder} is done, in the queue, or can never start")
    for name, jobs in ids.items():
        print(f"submitted {name}: job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}")
    for one in ready.steps:
        if one.job.requeue and one.launch and forbids_requeue(ids.get(one.step.name, ("",))[0]):
            print(
                f"  note: this cluster does not let {one.step.name} requeue; give its Step links=N to run it in N jobs"
            )
    print(f"  megabatch chain show {folder}")
    print(f"  megabatch chain cancel {folder}")
    return ExitCode.DONE


def _show(ready: ReadyChain, *, scripts: bool) -> int:
    header, *rows = graph_table(ready)
    text = f"chain {ready.chain.name} in {ready.folder}\n{table(header, rows)}"
    text += "".join(f"\nrefused here: {fault}" for fault in ready.refusals)
    if not scripts:
        print(f"usage: {_USAGE.format(file=ready.file.name)}\n{text}")
        return ExitCode.DONE
    print(text, file=sys.stderr, flush=True)
    for one in ready.steps:
        print(f"### {one.step.name}: {one.job.files.script}\n{ready.script(one)}")
    return ExitCode.DONE


def show_chain(folder: Path) -> int:
    """Prints the state of each step. Raises: LaunchError when the folder holds no chain."""
    header, *rows = state_table(states(recorded_chain(folder), folder))
    print(table(header, rows))
    return ExitCode.DONE


def cancel_chain(folder: Path) -> int:
    """Cancels every waiting or running step, the last first, so that none starts because another one ends.

    Raises: LaunchError when the folder holds no chain, or a step cannot be cancelled.
    """
    from megabatch.slurm.control import cancel

    active = [one for one in states(recorded_chain(folder), folder) if one.status.state.active]
    for one in reversed(active):
        print(f"cancelled {one.step.name}: job {cancel(one.status.run)}")
    if not active:
        print(f"no step of {folder} is waiting or running")
    return ExitCode.DONE
