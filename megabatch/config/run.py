"""The resolved run: what `run.json` holds, and how a recipe becomes it."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megabatch.config.declare import group_types
from megabatch.config.field_types import options
from megabatch.config.grpo_defaults import filled
from megabatch.config.heads import problem_type, with_head
from megabatch.config.layout import layout_of
from megabatch.config.lengths import row_tokens, sample_tokens
from megabatch.config.moe import MoE
from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.config.rules.check import check
from megabatch.config.rules.fields import invalid_fields
from megabatch.config.rules.optimization import peak_lr
from megabatch.config.shared_prompts import shares_prompts
from megabatch.config.torch_dtype import torch_dtype
from megabatch.errors import ConfigError
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.run_directory import write_atomic
from megabatch.tasks import Task
from megabatch.values import dataclass

SCHEMA_VERSION = 1
"""Raised whenever an older run.json could no longer be read, or would mean something else."""
EVALUATION = "evaluation"
"""In the provenance of an evaluation: what is evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run, resolved: all that launcher and trainer need to know, written once."""

    schema_version: int = SCHEMA_VERSION
    run_dir: str
    recipe: Recipe
    """With defaults that depend on other fields filled in; `learning_rate.lr_decay_iters` and, with `max_epochs`,
    `training.train_iters` stay None until the trainer has counted the data."""
    shape: ModelShape
    layout: Layout
    provenance: Mapping[str, Any]
    """Where the run comes from: versions, commit, command line, user; never a secret."""

    def save(self, path: Path) -> None:
        """Writes it as JSON, atomically."""
        write_atomic(path, _json(self))

    @property
    def only_evaluates(self) -> bool:
        """Whether it takes no step, so that its data need not be fit to train on."""
        return EVALUATION in self.provenance

    @property
    def task(self) -> Task:
        return resolved(self.recipe.kind)

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Reads it back, equal to what was saved. Parameters that the megabatch which wrote it did not have yet get
        their defaults, with a warning.

        Raises: ConfigError for a file that is missing or no JSON, another schema version, and unknown, missing or
        mistyped fields by name.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist: this is not a run directory") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); submit the run again") from error
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"{path}: schema_version={version!r}, but this megabatch reads {SCHEMA_VERSION}; "
                "use the megabatch that wrote it, or submit the run again"
            )
        lacks: list[str] = []
        config: RunConfig = _built(cls, found, place=str(path), lacks=lacks)
        if faults := list(invalid_fields(config.recipe)):
            raise ConfigError(f"{path} was edited: {'; '.join(map(str, faults))}")
        if not lacks:
            return config
        default = "its default" if len(lacks) == 1 else "their defaults"
        import logging

        logging.getLogger(__name__).warning("%s was written without %s; taking %s", path, ", ".join(lacks), default)
        recipe = derived(config.recipe, shape=config.shape, run_dir=Path(config.run_dir))
        return replace(config, recipe=recipe)


def resolve(recipe: Recipe, *, shape: ModelShape, run_dir: Path, provenance: Mapping[str, Any]) -> RunConfig:
    """The recipe with every derivable default filled in. Raises: ConfigError with all faults of the recipe."""
    faults = check(recipe, shape)
    if faults:
        raise ConfigError(faults)
    # Through JSON once, so that the launcher holds exactly what each rank will read.
    text = run_json(recipe, shape=shape, run_dir=run_dir, provenance=provenance)
    return typing.cast(RunConfig, _built(RunConfig, json.loads(text), place="run.json"))


def run_json(recipe: Recipe, *, shape: ModelShape, run_dir: Path, provenance: Mapping[str, Any]) -> str:
    """What `resolve(…).save` writes of a recipe without faults; for a sweep's hundreds of runs."""
    shape = with_head(recipe, shape)
    layout = layout_of(recipe, shape)
    assert layout is not None, "a recipe without faults has a layout"
    filled = derived(recipe, shape=shape, run_dir=run_dir)
    config = RunConfig(run_dir=str(run_dir), recipe=filled, shape=shape, layout=layout, provenance=provenance)
    return _json(config)


def save_folder(recipe: Recipe) -> Path:
    """`checkpoint.save`, or `megatron_output/<last part of the model's name, or the recipe's>`."""
    suffix = Path(recipe.model.model).name if recipe.model.model else recipe.name
    return Path(recipe.checkpoint.save or Path("megatron_output") / suffix)


def derived(recipe: Recipe, *, shape: ModelShape, run_dir: Path) -> Recipe:
    """A recipe without faults, with everything filled in that follows from its other fields and the model."""
    training, data, resources = recipe.training, recipe.data, recipe.resources
    dtype = torch_dtype(recipe, shape)
    max_length = sample_tokens(recipe, shape)
    task = resolved(recipe.kind)
    per_token = training.calculate_per_token_loss
    layer_scaling = recipe.precision.apply_query_key_layer_scaling
    return replace(
        recipe,
        model=replace(recipe.model, torch_dtype=dtype, tokenizer=recipe.model.tokenizer or recipe.model.model),
        precision=replace(
            recipe.precision,
            fp16=dtype == "float16",
            bf16=dtype == "bfloat16",
            apply_query_key_layer_scaling=dtype == "float16" if layer_scaling is None else layer_scaling,
        ),
        data=replace(
            data,
            max_length=max_length,
            seq_length=data.seq_length or max_length,
            packing_length=row_tokens(recipe, shape) if data.packing else None,
            loss_scale=data.loss_scale or task.loss_scale,
            truncation_strategy=data.truncation_strategy or task.truncation_strategy,
        ),
        training=replace(
            training,
            calculate_per_token_loss=task.calculate_per_token_loss if per_token is None else per_token,
            problem_type=problem_type(recipe) if training.num_labels else None,
        ),
        learning_rate=replace(recipe.learning_rate, lr=peak_lr(recipe)),
        parallel=_derived_parallel(recipe),
        moe=derived_moe(recipe, shape),
        rlhf=replace(recipe.rlhf, share_prompts=shares_prompts(recipe, shape)),
        grpo=_derived_grpo(recipe),
        checkpoint=replace(recipe.checkpoint, save=str(save_folder(recipe)), save_interval=save_interval(recipe)),
        logging=replace(recipe.logging, tensorboard_dir=recipe.logging.tensorboard_dir or str(run_dir / "runs")),
        evaluation=replace(
            recipe.evaluation,
            eval_interval=recipe.evaluation.eval_interval or save_interval(recipe),
        ),
        resources=replace(
            resources,
            tasks_per_node=resources.ranks_per_node,
            job_name=resources.job_name or recipe.name,
            preflight=resources.preflight_level,
            omp_num_threads=resources.omp_num_threads or resources.cpus_per_task or 1,
        ),
    )


def save_interval(recipe: Recipe) -> int:
    """In steps, or 1 epoch."""
    return 1 if recipe.checkpoint.save_strategy == "epoch" else recipe.checkpoint.save_interval


def _derived_parallel(recipe: Recipe) -> Any:
    parallel = recipe.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return parallel
    group = parallel.microbatch_group_size_per_virtual_pipeline_stage or parallel.pipeline_model_parallel_size
    return replace(parallel, microbatch_group_size_per_virtual_pipeline_stage=group)


def derived_moe(recipe: Recipe, shape: ModelShape) -> MoE:
    """The settings of experts for a model of this shape, which may be one beside the trained model."""
    if shape.num_experts is None:
        return recipe.moe
    return replace(
        recipe.moe,
        moe_router_score_function=recipe.moe.moe_router_score_function or "softmax",
        moe_router_load_balancing_type=recipe.moe.moe_router_load_balancing_type or "aux_loss",
    )


def _derived_grpo(recipe: Recipe) -> Any:
    if resolved(recipe.kind).name != "grpo":
        return recipe.grpo
    return filled(recipe.grpo, recipe.rollout, global_batch_size=recipe.batch.global_batch_size)


def _json(config: RunConfig) -> str:
    """A line for each parameter."""
    return _object(_fields(config), indent="  ", within="recipe") + "\n"


def _object(fields: Mapping[str, Any], *, indent: str, within: str = "") -> str:
    """Objects among the fields have a line for each of theirs too; the one called `within` goes one deeper."""
    lines = []
    for name, value in fields.items():
        if name == within:
            text = _object(_fields(value), indent=indent + "  ")
        elif inner := _as_object(value):
            text = f"{{\n{indent}  {_encoder(indent + '  ').encode(inner)[1:-1]}\n{indent}}}"
        else:
            text = _encoder("").encode(value)
        lines.append(f'{indent}"{name}": {text}')
    return "{\n" + ",\n".join(lines) + f"\n{indent[2:]}}}"


@functools.cache
def _encoder(indent: str) -> json.JSONEncoder:
    """Lines are made by the separator: with its own indentation the encoder is not the one in C, and slow."""
    separators = (f",\n{indent}" if indent else ", ", ": ")
    return json.JSONEncoder(allow_nan=False, separators=separators, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has for a value that the encoder does not know."""
    if (found := _as_object(value)) is not None:
        return found
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"run.json cannot hold {value!r}")


def _as_object(value: Any) -> dict[str, Any] | None:
    """A dataclass or a mapping as a dictionary, whose own values are as they were; None for anything else."""
    if dataclasses.is_dataclass(value):
        return _fields(value)
    return dict(value) if isinstance(value, Mapping) else None


def _fields(group: Any) -> dict[str, Any]:
    kind: type = type(group)
    return {name: getattr(group, name) for name in _field_names(kind)}


@functools.cache
def _field_names(group: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(group))


def _built(hint: Any, found: Any, *, place: str, lacks: list[str] | None = None) -> Any:
    """The value of a declared type of which JSON made `found`. Args: lacks: gets the parameters that are not there;
    None if all must be."""
    if dataclasses.is_dataclass(hint):
        return _built_group(typing.cast(type, hint), found, place=place, lacks=lacks)
    for option in options(hint) if isinstance(found, list) else ():
        if typing.get_origin(option) in (tuple, Sequence):
            return tuple(_built(typing.get_args(option)[0], one, place=place) for one in found)
    return found


def _built_group(group: type, found: Any, *, place: str, lacks: list[str] | None) -> Any:
    hints = _hints(group)
    fields = dataclasses.fields(group)
    names = [field.name for field in fields]
    if not isinstance(found, dict):
        raise ConfigError(f"{place} must be an object with the fields of {group.__name__}")
    for name in found:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise ConfigError(
                f"{place}: {name} is not a field of {group.__name__}{f'; try {near[0]}' if near else ''}"
            )
    for field in fields:
        if field.name in found:
            continue
        if lacks is None or (group is not Recipe and group not in _parameter_groups()) or not _has_default(field):
            raise ConfigError(f"{place}: {field.name} of {group.__name__} is missing; submit the run again")
        lacks.append(field.name)
    values = {
        name: _built(hints[name], found[name], place=f"{place}: {name}", lacks=lacks)
        for name in names
        if name in found
    }
    return group(**values)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@functools.cache
def _parameter_groups() -> frozenset[type]:
    return frozenset(group_types(Recipe).values())


# evaluating annotations is most of the time that reading a run takes, and a sweep resolves hundreds
_hints = functools.cache(typing.get_type_hints)
