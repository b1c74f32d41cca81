"""A chain made ready: each step's folder, job and script, and every fault of the whole; nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megabatch.chain.declare import Chain, Command, Convert, Step
from megabatch.chain.graph import graph_faults, in_order
from megabatch.chain.outputs import Reference, references, resolved
from megabatch.config.flags import Actions
from megabatch.config.layout import layout_of
from megabatch.config.model import Model
from megabatch.config.recipe import Recipe
from megabatch.config.resources import Resources
from megabatch.config.rules.check import check
from megabatch.entry.launch import Launch, prepare
from megabatch.entry.model import FoundModel, find_model
from megabatch.entry.preflight import damaged_inputs, missing_inputs
from megabatch.errors import ConfigError, ConversionError, Fault, LaunchError
from megabatch.plan.shape import ModelShape
from megabatch.slurm.job import Input, JobSpec
from megabatch.slurm.profile import ClusterProfile, load_profile
from megabatch.slurm.render import render
from megabatch.slurm.snapshot import snapshot_path

OUTPUT = "output"
"""Folder of a conversion's result, inside its step's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyStep:
    """One step, decided."""

    step: Step
    job: JobSpec
    work: Recipe | Convert | Command
    """The step's own, with paths in place of references."""
    launch: Launch | None = None
    """Of a training run."""
    shape: ModelShape | None = None
    """Of the model that it makes or passes on."""

    @property
    def kind(self) -> str:
        return {Recipe: "train", Convert: "convert", Command: "command"}[type(self.work)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyChain:
    """A chain, decided."""

    chain: Chain
    file: Path
    folder: Path
    steps: tuple[ReadyStep, ...]
    """Each after all that it waits for."""
    cluster: str | None
    profile: ClusterProfile

    @property
    def code(self) -> Path:
        """Folder for code snapshots, shared by the steps."""
        return self.folder / "code"

    def script(self, ready: ReadyStep) -> str:
        """Raises: LaunchError."""
        return render(ready.job, self.profile)


def make_ready(chain: Chain, actions: Actions, *, file: Path) -> ReadyChain:
    """Decides everything about a chain. Raises: ConfigError with all faults, of the graph and of every step."""
    if faults := graph_faults(chain):
        raise ConfigError(faults)
    profile = load_profile(actions.cluster) if actions.cluster else ClusterProfile()
    folder = Path(actions.run_dir or chain.save or Path("megatron_output") / chain.name).expanduser().absolute()
    snapshot = None if actions.local else snapshot_path(folder / "code", recipe=file)
    made: dict[str, ReadyStep] = {}
    for step in in_order(chain):
        builder = _Builder(chain, step, folder, made, actions, file)
        try:
            ready = builder.ready()
            job = replace(ready.job, snapshot=snapshot)
            ready = replace(ready, job=job, launch=ready.launch and replace(ready.launch, job=job))
            render(job, profile)
            faults += [_named(step, fault) for fault in builder.faults(ready)]
            made[step.name] = ready
        except ConfigError as error:
            own = error.faults or [Fault("", None, str(error), bare=True)]
            faults += [_named(step, fault) for fault in own]
            made[step.name] = ReadyStep(step=step, job=builder.spec(Resources()), work=step.work)
        except LaunchError as error:
            faults.append(Fault(f"{step.name}:", None, str(error), bare=True))
    if faults:
        raise ConfigError(faults)
    return ReadyChain(
        chain=chain, file=file, folder=folder, steps=tuple(made.values()), cluster=actions.cluster, profile=profile
    )


def _named(step: Step, fault: Fault) -> Fault:
    return replace(fault, field=f"{step.name}: {fault.field}")


@dataclass(frozen=True, slots=True)
class _Builder:
    """What is needed to decide one step, with the steps before it."""

    chain: Chain
    step: Step
    folder: Path
    made: Mapping[str, ReadyStep]
    actions: Actions
    file: Path

    @property
    def directory(self) -> Path:
        return self.folder / self.step.name

    def ready(self) -> ReadyStep:
        """Raises: ConfigError."""
        work = resolved(self.step.work, lambda ref: str(self._input(ref).path))
        if isinstance(work, Recipe):
            return self._training(work)
        if isinstance(work, Convert):
            work = replace(work, model=_absolute(work.model), mcore_model=_absolute(work.mcore_model))
            job = replace(self.spec(work.resources), arguments=conversion_arguments(work, self.directory / OUTPUT))
            return ReadyStep(step=self.step, work=work, job=job, shape=self._shape_of_conversion(work))
        if isinstance(work, Command):
            return ReadyStep(step=self.step, work=work, job=self._command(work))
        rule = f"must be a Recipe, a Convert or a Command, not {type(work).__name__}"
        raise ConfigError([Fault("work", None, rule, bare=True)])

    def faults(self, ready: ReadyStep) -> Iterator[Fault]:
        """Faults that the step would have alone, except in what earlier steps make."""
        work = self.step.work
        if ready.launch is not None and isinstance(work, Recipe):
            yield from ready.launch.faults()
            model = ready.launch.model
            if model.shape is None and references(work.model.model):
                rule = "is made by a step whose model's shape is not known before it runs; training needs to know it"
                yield Fault("model.model", None, rule, bare=True)
            own = _without_references(work)
            yield from missing_inputs(own, model) or damaged_inputs(own, model)
        elif isinstance(ready.work, Convert):
            yield from _resource_faults(ready.work.resources)
            yield from _conversion_faults(ready.work, waits=bool(references(work)))
        elif isinstance(ready.work, Command):
            yield from _resource_faults(ready.work.resources)

    def spec(self, resources: Resources) -> JobSpec:
        """A job of these resources that is no training run."""
        return JobSpec(
            name=resources.job_name or f"{self.chain.name}-{self.step.name}",
            run_directory=self.directory,
            nodes=resources.nodes,
            tasks_per_node=resources.ranks_per_node,
            gpus_per_node=resources.gpus_per_node,
            cpus_per_task=resources.cpus_per_task,
            omp_num_threads=resources.omp_num_threads,
            mem_gib=resources.mem_gib,
            time=resources.time,
            signal_delay_s=resources.signal_delay_s,
            requeue=resources.requeue,
            max_restarts_without_progress=resources.max_restarts_without_progress,
            hang_timeout_s=0,
            python=sys.executable,
            working_directory=Path.cwd(),
            inputs=self._inputs(),
        )

    def _training(self, recipe: Recipe) -> ReadyStep:
        declared = self.step.work
        assert isinstance(declared, Recipe)
        launch = prepare(recipe, replace(self.actions, run_dir=str(self.directory)), recipe_file=self.file)
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
        launch = replace(launch, job=job, code=self.folder / "code")
        return ReadyStep(step=self.step, work=recipe, job=job, launch=launch, shape=launch.model.shape)

    def _command(self, work: Command) -> JobSpec:
        words = [str(word) for word in work.argv]
        if isinstance(work.argv, str) or not words:
            rule = "must be a list of the program and its arguments"
            raise ConfigError([Fault("argv", work.argv, rule, try_=(["python", "evaluate.py"],))])
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
        """Where what is referred to will be."""
        maker = self.folder / ref.step
        if ref.what == "folder":
            return Input(maker)
        if ref.what.startswith("file "):
            return Input(maker / ref.what.removeprefix("file "))
        if isinstance(self.made[ref.step].step.work, Convert):
            return Input(maker / OUTPUT)
        link = self.directory / "inputs" / ref.step
        return Input(link if ref.what == "checkpoint" else link / ref.what, run=maker, link=link)

    def _shape_of_conversion(self, work: Convert) -> ModelShape | None:
        """Of the model that it converts, as far as it is known: a folder here, or what an earlier step makes."""
        declared = self.step.work
        assert isinstance(declared, Convert)
        source = declared.mcore_model if declared.to_hf else declared.model
        if made := references(source):
            return self.made[made[0].step].shape
        return find_model(Recipe(name="x", task="pt", model=Model(model=work.model))).shape if work.model else None


def conversion_arguments(work: Convert, output: Path) -> tuple[str, ...]:
    """What `python` runs; a conversion that comes back goes on where it was."""
    words = ["-P", "-m", "megabatch.converters.command", "--output_dir", str(output), "--resume"]
    for field in fields(work):
        value = getattr(work, field.name)
        if field.name == "resources" or value in (None, False):
            continue
        words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    return tuple(words)


def _conversion_faults(work: Convert, *, waits: bool) -> Iterator[Fault]:
    from megabatch.converters import conversion
    from megabatch.converters.command.flags import parse
    from megabatch.converters.command.main import check_flags

    try:
        check_flags(parse(conversion_arguments(work, Path("output"))[3:]))
        if not waits:
            conversion.make_plan(
                to_mcore=work.to_mcore,
                model=work.model,
                mcore_model=work.mcore_model,
                torch_dtype=work.torch_dtype,
                max_shard_size=work.max_shard_size,
            )
    except ConversionError as error:
        yield Fault("", None, str(error), bare=True)


def _resource_faults(resources: Resources) -> list[Fault]:
    """Of the fields themselves, and of their rules."""
    if not isinstance(resources, Resources):
        return [Fault("resources", None, "must be a Resources", bare=True)]
    found = check(Recipe(name="x", task="pt", resources=resources))
    alone = ("resources.nodes",)  # how nodes divide into a layout is no concern of these jobs
    return [fault for fault in found if fault.field.startswith("resources.") and fault.field not in alone]


def _without_references(recipe: Recipe) -> Recipe:
    """Only what is to be found on this machine already."""
    data = recipe.data
    return replace(
        recipe,
        model=replace(recipe.model, tokenizer=_own(recipe.model.tokenizer)),
        data=replace(data, dataset=_owned(data.dataset), val_dataset=_owned(data.val_dataset)),
        checkpoint=replace(recipe.checkpoint, load=_own(recipe.checkpoint.load)),
    )


def _own(text: str | None) -> str | None:
    return None if references(text) else text


def _owned(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for text in texts if not references(text))


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())
