"""What `megabatch evaluate` evaluates: a recipe's model, a run's checkpoint, or an exported folder, as a recipe that
evaluates once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from megabatch.config.checkpoint import Checkpoint
from megabatch.config.data import Data
from megabatch.config.flags import Actions, parse
from megabatch.config.model import Model
from megabatch.config.optimization import LearningRate
from megabatch.config.parallel import Parallel
from megabatch.config.recipe import Recipe
from megabatch.config.reference import references_named
from megabatch.config.resolved import resolved
from megabatch.config.resources import Resources
from megabatch.config.rlhf import Rlhf
from megabatch.config.run import RunConfig
from megabatch.config.training import Training
from megabatch.config.tuner import Tuner
from megabatch.config.watching import Watching
from megabatch.did_you_mean import did_you_mean
from megabatch.errors import ConfigError, Fault
from megabatch.hub_cache import is_hub_name
from megabatch.run_directory import RunDirectory
from megabatch.saved.history import HF, MCORE, is_checkpoint, named_by_best, newest_in
from megabatch.tasks import TASKS, Task

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_NEW_MODEL, _NEW_WEIGHTS = "model", "model.safetensors"
"""Folder in a run directory with the tokenizer and config.json of a new model, and its weights before LoRA."""


def trained_recipe(target: Path, *, checkpoint: str | None) -> Recipe:
    """The recipe of a run, with the model of its newest checkpoint in place of the one that it began with.

    Args: target: a run directory, or one of its `step_*` folders; checkpoint: the name of another one, or `best`.
    Raises: ConfigError.
    """
    if is_checkpoint(target.absolute()):
        target, checkpoint = target.absolute().parents[1], target.name
    run = RunConfig.load(RunDirectory(target).run_json)
    step = _step(RunDirectory(target), checkpoint)
    recipe = replace(_as_declared(run), checkpoint=Checkpoint())
    return _with_weights(_with_reference(recipe, run, step), run, step)


def untrained_recipe(declared: Recipe) -> Recipe:
    """Of a recipe file: the model that it starts from. Its reference has not followed it yet, unless the recipe goes
    on from a checkpoint of another run, which then has what became of that run's."""
    begins = declared.checkpoint.finetune or not (declared.checkpoint.load or declared.tuner.adapter_load)
    return _without_following(declared) if begins else declared


def _as_declared(run: RunConfig) -> Recipe:
    """A run's recipe without values that only repeat others: flags may change those."""
    recipe = run.recipe
    return replace(
        recipe,
        precision=replace(recipe.precision, fp16=None, bf16=None),
        data=replace(recipe.data, seq_length=None),
    )


def _step(run: RunDirectory, name: str | None) -> Path:
    if name is None:
        found = newest_in(run.checkpoints)
    elif name == "best":
        found = named_by_best(run)
    else:
        found = run.checkpoints / name if (run.checkpoints / name).is_dir() else None
    if found is None:
        asked = "" if name is None else f" {name!r}"
        raise ConfigError(f"{run.checkpoints} has no checkpoint{asked}; name one of its step_* folders, or `best`")
    return found


def _with_weights(recipe: Recipe, run: RunConfig, step: Path) -> Recipe:
    """The recipe with the weights of a checkpoint: its Hugging Face folder, else what the run resumes from, which also
    holds a reference that follows the policy."""
    exported = step / HF
    if (exported / _CONFIG).is_file() and not recipe.rlhf.sync_ref_model:
        model = Model(model=str(exported), torch_dtype=run.recipe.model.torch_dtype)
        if _compares(recipe) and run.recipe.model.model is not None:  # a reference gets the new tokens too
            own = run.recipe.model
            tokens = own.new_special_tokens
            model = replace(model, tokenizer=own.tokenizer if tokens else None, new_special_tokens=tokens)
        return replace(recipe, model=model, tuner=Tuner())
    model = recipe.model
    if model.model is None and model.tokenizer is None:  # its own has the new tokens
        model = replace(model, tokenizer=str(Path(run.run_dir) / _NEW_MODEL), new_special_tokens=())
    if recipe.tuner.tuner_type == "lora":
        tuner, load = replace(recipe.tuner, adapter_load=str(step)), run.recipe.checkpoint.load
    else:
        tuner, load = recipe.tuner, str(step)
    return replace(recipe, model=model, tuner=tuner, checkpoint=Checkpoint(finetune=True, load=load))


def _with_reference(recipe: Recipe, run: RunConfig, step: Path) -> Recipe:
    """With the reference that the run had, now that its own model is the trained one. GRPO measures rewards alone."""
    if run.task.generates:
        return _of_rewards_alone(recipe)
    if recipe.rlhf.sync_ref_model:  # what it began with is another reference; the checkpoint has what became of it
        began = replace(
            recipe, rlhf=replace(recipe.rlhf, ref_load=None), bridge=replace(recipe.bridge, ref_model=None)
        )
        return began if (step / MCORE).is_dir() else _without_following(began)
    if not _compares(recipe) or _names_reference(recipe):
        return recipe
    if run.recipe.checkpoint.load is not None:
        return replace(recipe, rlhf=replace(recipe.rlhf, ref_load=run.recipe.checkpoint.load))
    return replace(recipe, bridge=replace(recipe.bridge, ref_model=_began_with(run)))


def _of_rewards_alone(recipe: Recipe) -> Recipe:
    """Without a reference, and without what is said of one."""
    return replace(
        recipe,
        grpo=replace(recipe.grpo, beta=0.0, kl_in_reward=False),
        rlhf=Rlhf(rlhf_type=recipe.rlhf.rlhf_type, share_prompts=recipe.rlhf.share_prompts),
        bridge=replace(recipe.bridge, ref_model=None, ref_adapters=()),
    )


def _without_following(recipe: Recipe) -> Recipe:
    """With a reference that stays as it is."""
    names = ("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")
    return replace(recipe, rlhf=replace(recipe.rlhf, **{name: getattr(Rlhf(), name) for name in names}))


def _compares(recipe: Recipe) -> bool:
    task = resolved(recipe.kind).name
    return task == "kto" or (task == "dpo" and not recipe.dpo.reference_free)


def _names_reference(recipe: Recipe) -> bool:
    return recipe.bridge.ref_model is not None or recipe.rlhf.ref_load is not None


def _began_with(run: RunConfig) -> str | None:
    """Name or folder of the run's model before training; of a new model LoRA runs alone keep the weights."""
    kept = Path(run.run_dir) / _NEW_MODEL
    return run.recipe.model.model or (str(kept) if (kept / _NEW_WEIGHTS).is_file() else None)


def require_reference(recipe: Recipe, target: Path) -> None:
    """Args: recipe: of the evaluation of a run, with its flags. Raises: ConfigError where neither run nor flags have
    the reference any more."""
    if not _compares(recipe) or _names_reference(recipe) or recipe.rlhf.sync_ref_model:
        return
    run = RunConfig.load(RunDirectory(_run_of(target)).run_json)
    if run.recipe.rlhf.sync_ref_model:
        why = f"had a reference that followed the policy (rlhf.sync_ref_model), which {MCORE}/ of a checkpoint holds, "
        why += "and this one has none (checkpoint.no_save_optim)"
    else:
        why = "began with a new model, whose weights are gone"
    raise ConfigError(f"{run.run_dir} {why}, and {run.task.name} compares with it; name a reference with --ref_model")


def _run_of(target: Path) -> Path:
    return target.absolute().parents[1] if is_checkpoint(target.absolute()) else target


def folder_recipe(target: Path, *, task: str | None, gpus: int) -> Recipe:
    """A recipe with the task's defaults for a Hugging Face folder or name. Args: gpus: of this machine."""
    known = [one for one in TASKS if one.built]
    chosen = next((one for one in known if one.name == task), None)
    if chosen is None:
        names = ", ".join(one.name for one in known)
        said = "is missing" if task is None else f"{task} is no task"
        raise ConfigError(
            [Fault("--task", None, f"{said}: a folder does not say what it is for; try {names}", bare=True)]
        )
    return replace(
        _of_task(chosen, target.name),
        model=Model(model=str(target)),
        parallel=Parallel(distributed_backend="nccl" if gpus else "gloo"),
        resources=Resources(nodes=1, gpus_per_node=gpus, tasks_per_node=gpus or 1),
    )


def _of_task(task: Task, name: str) -> Recipe:
    rlhf = Rlhf() if task.rlhf_type is None else Rlhf(rlhf_type=task.rlhf_type)  # type: ignore[arg-type]
    training = Training(task_type=task.task_type)  # type: ignore[arg-type]
    return Recipe(name=f"{name}-evaluation", task=task.task, rlhf=rlhf, training=training, data=Data())


def evaluation_recipe(recipe: Recipe, flags: Sequence[str], *, task: str | None) -> Recipe:
    """The recipe with its flags, which takes no step and saves nothing.

    `--dataset` names what is evaluated; else it is the recipe's validation data.
    Raises: ConfigError for flags of a launch, another task than the recipe's, and no data.
    """
    actions, chosen = parse(flags, recipe)
    none = Actions()
    asked = [field.name for field in fields(Actions) if getattr(actions, field.name) != getattr(none, field.name)]
    faults = [Fault(f"--{name}", None, "has no effect on an evaluation, which runs here", bare=True) for name in asked]
    if task is not None and chosen.kind is not None and chosen.kind.name != task:
        faults.append(
            Fault("--task", None, f"{task} is not the recipe's, {chosen.kind.name}; leave it out", bare=True)
        )
    if faults:
        raise ConfigError(faults)
    return _once(_following(replace(chosen, data=_data(chosen.data, declared=recipe.data)), declared=recipe))


def _following(recipe: Recipe, *, declared: Recipe) -> Recipe:
    """With a reference that stays as it is where a flag names one in place of the checkpoint's."""
    return recipe if references_named(recipe) == references_named(declared) else _without_following(recipe)


def _data(data: Data, *, declared: Data) -> Data:
    """Args: declared: without the flags."""
    alone = replace(data, streaming=False, interleave_prob=None)
    if data.dataset != declared.dataset:
        return replace(alone, val_dataset=data.dataset, split_dataset_ratio=0.0)
    if data.val_dataset:
        return replace(alone, dataset=data.val_dataset, split_dataset_ratio=0.0)
    if not data.split_dataset_ratio:
        raise ConfigError([Fault("--dataset", None, "is missing: the recipe has no validation data", bare=True)])
    return alone


def _once(recipe: Recipe) -> Recipe:
    checkpoint = replace(recipe.checkpoint, save=None, save_strategy="steps")
    one = replace(
        recipe,
        training=replace(recipe.training, train_iters=1, max_epochs=None),
        learning_rate=LearningRate(),
        watching=Watching(),
        checkpoint=replace(checkpoint, metric_for_best_model=None, greater_is_better=None),
        logging=replace(recipe.logging, report_to=None),
        data=replace(recipe.data, dataloader_type="cyclic"),
        resources=replace(recipe.resources, nodes=1, preflight=None),
    )
    return replace(one, batch=replace(recipe.batch, global_batch_size=_batch(one)))


def _batch(recipe: Recipe) -> int:
    """Samples at a time: the recipe's global batch, on which some losses depend, rounded up to what all data-parallel
    ranks take at a time."""
    size = recipe.batch.micro_batch_size * _replicas(recipe)
    return -(-recipe.batch.global_batch_size // size) * size


def _replicas(recipe: Recipe) -> int:
    parallel = recipe.parallel
    of_one = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    return max(1, recipe.resources.world_size // of_one)


def is_run(target: Path) -> bool:
    """A run directory, or one of its checkpoints."""
    return RunDirectory(target).run_json.is_file() or is_checkpoint(target.absolute())


def require_target(target: Path) -> None:
    """Raises: ConfigError for a path that is nothing."""
    if not target.exists() and not is_hub_name(str(target)):
        raise ConfigError(f"{target} does not exist{did_you_mean(target)}")
    if target.is_dir() and not is_run(target) and not any((target / name).is_file() for name in (_CONFIG, _ADAPTER)):
        raise ConfigError(
            f"{target} is no run directory (it has no run.json), no checkpoint and no Hugging Face folder (no "
            f"{_CONFIG}); name one of these, or a recipe file"
        )
