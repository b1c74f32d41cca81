"""Prepares a chain: each step's folder, job and script, and every fault; nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megabatch.chain.declare import Chain, Step
from megabatch.chain.graph import graph_faults, in_order
from megabatch.chain.step import ReadyStep, StepBuilder
from megabatch.config.flags import Actions
from megabatch.config.recipe import Recipe
from megabatch.config.user_code import user_code
from megabatch.entry.launch_checks import folder_faults
from megabatch.errors import ConfigError, Fault
from megabatch.slurm.profile import ClusterProfile, load_profile
from megabatch.slurm.render import render
from megabatch.slurm.snapshot import Snapshot, snapshot_of
from megabatch.user_code import files_to_archive
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyChain:
    """A chain, decided."""

    chain: Chain
    file: Path
    folder: Path
    steps: tuple[ReadyStep, ...]
    """Each after its dependencies."""
    refusals: tuple[Fault, ...]
    """Faults for which a real start would be refused on this machine."""
    cluster: str | None
    profile: ClusterProfile
    code: Snapshot | None
    """The code that all steps run on a cluster; None for a chain on this machine."""

    def script(self, ready: ReadyStep) -> str:
        """Raises: LaunchError."""
        return render(ready.job, self.profile)


def make_ready(chain: Chain, actions: Actions, *, file: Path) -> ReadyChain:
    """Decides everything about a chain.

    Raises: ConfigError with all faults of the graph and of every step; things that only this machine lacks are faults
    only with `--submit` and `--local`.
    """
    if faults := graph_faults(chain):
        raise ConfigError(faults)
    profile = load_profile(actions.cluster) if actions.cluster else ClusterProfile()
    folder = Path(actions.run_dir or chain.save or Path("megatron_output") / chain.name).expanduser().absolute()
    recipes = [step.work for step in chain.steps if isinstance(step.work, Recipe)]
    further = files_to_archive([text for recipe in recipes for text in user_code(recipe)])
    code = None if actions.local else snapshot_of(folder / "code", recipe=file, further=further)
    made: dict[str, ReadyStep] = {}
    refusals = folder_faults(folder, recipe_file=file, local=actions.local, own=[s.name for s in chain.steps])
    for step in in_order(chain):
        builder = StepBuilder(chain, step, folder, made, actions, file, code)
        ready, own = builder.decided(profile)
        made[step.name] = ready
        faults += [_named(step, fault) for fault in own]
        if not own:
            refusals += [_named(step, fault) for fault in builder.refusals(ready)]
    starts = actions.submit or actions.local
    if faults or (starts and refusals):
        raise ConfigError([*faults, *(refusals if starts else [])])
    return ReadyChain(
        chain=chain,
        file=file,
        folder=folder,
        steps=tuple(made.values()),
        refusals=tuple(refusals),
        cluster=actions.cluster,
        profile=profile,
        code=code,
    )


def _named(step: Step, fault: Fault) -> Fault:
    return replace(fault, field=f"{step.name}: {fault.field}".strip())
