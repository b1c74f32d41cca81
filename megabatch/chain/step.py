"""Prepares one step of a chain: its folder, its job, and its faults, with what earlier steps make counted as there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megabatch.chain.conversion import conversion_arguments, flag_faults, source_faults, with_absolute_paths
from megabatch.chain.declare import Chain, Command, Convert, Step
from megabatch.chain.outputs import Reference, references, resolved
from megabatch.config.flags import Actions
from megabatch.config.layout import layout_of
from megabatch.config.model import Model
from megabatch.config.recipe import Recipe
from megabatch.config.resources import Resources
from megabatch.config.rules.check import check
from megabatch.config.rules.roles import role_faults
from megabatch.config.rules.secrets import no_secrets_in_words
from megabatch.converters.request import ConversionRequest
from megabatch.entry.launch import Launch, plain_job, prepare
from megabatch.entry.launch_checks import faults_here
from megabatch.entry.model import FoundModel, find_model
from megabatch.errors import ConfigError, Fault, LaunchError
from megabatch.plan.shape import ModelShape
from megabatch.slurm.job import Input, JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.render import render
from megabatch.slurm.snapshot import Snapshot
from megabatch.values import dataclass

OUTPUT = "output"
"""Folder of a conversion's result, inside its step's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyStep:
    """One step, decided."""

    step: Step
    job: JobSpec
    work: Recipe | Convert | Command
    """The step's own work, with paths in place of references."""
    launch: Launch | None = None
    """Of a training run."""
    shape: ModelShape | None = None
    """Shape of the model that it makes or passes on."""

    @property
    def kind(self) -> str:
        return {Recipe: "train", Convert: "convert", Command: "command"}[type(self.work)]


@dataclass(frozen=True, slots=True)
class StepBuilder:
    """What is needed to decide one step, with the steps before it."""

    chain: Chain
    step: Step
    folder: Path
    made: Mapping[str, ReadyStep]
    actions: Actions
    file: Path
    code: Snapshot | None

    @property
    def directory(self) -> Path:
        return self.folder / self.step.name

    def ready(self) -> ReadyStep:
        """Raises: ConfigError."""
        work = resolved(self.step.work, lambda ref: str(self._input(ref).path))
        if isinstance(work, Recipe):
            return self._training(work)
        if isinstance(work, Convert):
            work = replace(work, request=with_absolute_paths(work.request))
            job = replace(self.spec(work.resources), arguments=conversion_arguments(work, self.directory / OUTPUT))
            return ReadyStep(step=self.step, work=work, job=job, shape=self._shape_of_conversion(work.request))
        if isinstance(work, Command):
            return ReadyStep(step=self.step, work=work, job=self._command(work))
        rule = f"must be a Recipe, a Convert or a Command, not {type(work).__name__}"
        raise ConfigError([Fault("work", None, rule, bare=True)])

    def decided(self, profile: ClusterProfile) -> tuple[ReadyStep, list[Fault]]:
        """The step and its broken rules; a broken step has only the parts that other steps need."""
        try:
            ready = self.ready()
            job = replace(ready.job, snapshot=None if self.code is None else self.code.path)
            ready = replace(ready, job=job, launch=ready.launch and replace(ready.launch, job=job))
            if faults := list(self.faults(ready)):
                return ready, faults
            render(job, profile)
            return ready, []
        except ConfigError as error:
            faults = [*error.faults] or [Fault("", None, str(error), bare=True)]
        except LaunchError as error:
            faults = [Fault("", None, str(error), bare=True)]
        return ReadyStep(step=self.step, job=self.spec(Resources()), work=self.step.work), faults

    def faults(self, ready: ReadyStep) -> Iterator[Fault]:
        """The rules that the step breaks even on its own."""
        work = self.step.work
        if ready.launch is not None and isinstance(work, Recipe):
            yield from ready.launch.faults()
            model = ready.launch.model
            if model.fault is not None:
                yield model.fault
            if model.shape is None and references(work.model.model):
                rule = "is made by a step whose model's shape is not known before it runs, which training needs"
                yield Fault("model.model", None, rule, bare=True)
        elif isinstance(ready.work, Convert | Command):
            yield from _resource_faults(ready.work.resources)
        if isinstance(ready.work, Convert):
            yield from flag_faults(ready.work)
        elif isinstance(ready.work, Command):
            yield from no_secrets_in_words("argv", ready.work.argv)
            yield from role_faults(ready.work.roles)

    def refusals(self, ready: ReadyStep) -> Iterator[Fault]:
        """Missing or damaged inputs on this machine, except those that earlier steps make."""
        work = self.step.work
        if ready.launch is not None and isinstance(work, Recipe):
            own = _without_references(work)
            yield from faults_here(ready.launch, local=self.actions.local, own=own)
        elif isinstance(ready.work, Convert) and not references(work):
            yield from source_faults(ready.work)

    def spec(self, resources: Resources) -> JobSpec:
        """A job with these resources that does not train."""
        return replace(
            plain_job(resources, name=f"{self.chain.name}-{self.step.name}", folder=self.directory),
            working_directory=Path.cwd(),
            inputs=self._inputs(),
        )

    def _training(self, recipe: Recipe) -> ReadyStep:
        declared = self.step.work
        assert isinstance(declared, Recipe)
        actions = replace(self.actions, run_dir=str(self.directory))
        launch = prepare(recipe, actions, recipe_file=self.file, code=self.code)
        made = references(declared.model.model)
        if made:
            shape = self.made[made[0].step].shape
            launch = replace(
                launch,
                model=FoundModel(shape, f"made by step {made[0].step}"),
                layout=layout_of(recipe, shape),
            )
        job = replace(
            launch.job,
            name=recipe.resources.job_name or f"{self.chain.name}-{self.step.name}",
            inputs=self._inputs(),
            links=self.step.links,
            requeue=launch.job.requeue and self.step.links == 1,
        )
        launch = replace(launch, job=job)
        return ReadyStep(step=self.step, work=recipe, job=job, launch=launch, shape=launch.model.shape)

    def _command(self, work: Command) -> JobSpec:
        words = [str(word) for word in work.argv]
        if isinstance(work.argv, str) or not words:
            rule = "must be a list of the program and its arguments"
            raise ConfigError([Fault("argv", None, rule, try_=(["python", "evaluate.py"],), bare=True)])
        own_python = words[0] == "python"
        return replace(
            self.spec(work.resources),
            arguments=tuple(words[1:]) if own_python else None,
            program=None if own_python else tuple(words),
            environment=work.environment,
            inherit=tuple(work.inherit),
            roles=tuple(work.roles),
        )

    def _inputs(self) -> tuple[Input, ...]:
        return tuple(self._input(ref) for ref in references(self.step.work) if ref.what != "folder")

    def _input(self, ref: Reference) -> Input:
        """The future path of a referenced output."""
        maker = self.folder / ref.step
        if ref.what == "folder":
            return Input(maker)
        if ref.what.startswith("file "):
            return Input(maker / ref.what.removeprefix("file "))
        if isinstance(self.made[ref.step].step.work, Convert):
            return Input(maker / OUTPUT)
        link = self.directory / "inputs" / ref.step
        return Input(link if ref.what == "checkpoint" else link / ref.what, run=maker, link=link)

    def _shape_of_conversion(self, request: ConversionRequest) -> ModelShape | None:
        """Shape of the model that it converts, if known: from a local folder or from an earlier step."""
        declared = self.step.work
        assert isinstance(declared, Convert)
        source = declared.request.mcore_model if request.to_hf else declared.request.model
        if made := references(source):
            return self.made[made[0].step].shape
        if not request.model:
            return None
        return find_model(Recipe(name="x", task="pt", model=Model(model=str(request.model)))).shape


def _resource_faults(resources: Resources) -> list[Fault]:
    """Faults of the fields themselves, and of their rules."""
    if not isinstance(resources, Resources):
        return [Fault("resources", None, "must be a Resources", bare=True)]
    found = check(Recipe(name="x", task="pt", resources=resources))
    alone = ("resources.nodes",)  # these jobs have no parallel layout for the nodes to divide into
    return [fault for fault in found if fault.field.startswith("resources.") and fault.field not in alone]


def _without_references(recipe: Recipe) -> Recipe:
    """Keeps only inputs that can already exist on this machine."""
    data = recipe.data
    return replace(
        recipe,
        model=replace(recipe.model, tokenizer=_own(recipe.model.tokenizer)),
        data=replace(data, dataset=_owned(data.dataset), val_dataset=_owned(data.val_dataset)),
        checkpoint=replace(recipe.checkpoint, load=_own(recipe.checkpoint.load)),
        bridge=replace(
            recipe.bridge,
            adapters=_owned(recipe.bridge.adapters),
            ref_adapters=_owned(recipe.bridge.ref_adapters),
            ref_model=_own(recipe.bridge.ref_model),
        ),
        rlhf=replace(
            recipe.rlhf, ref_load=_own(recipe.rlhf.ref_load), ref_adapter_load=_own(recipe.rlhf.ref_adapter_load)
        ),
        gkd=replace(recipe.gkd, teacher_model=_own(recipe.gkd.teacher_model)),
        tuner=replace(recipe.tuner, adapter_load=_own(recipe.tuner.adapter_load)),
    )


def _own(text: str | None) -> str | None:
    return None if references(text) else text


def _owned(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for text in texts if not references(text))
