"""Whether the names of what is trained are the model's, and an adapter that a run starts from is one of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from megabatch.config.recipe import Recipe
from megabatch.converters.adapters.adapter import Tables
from megabatch.converters.adapters.config import scale_of
from megabatch.converters.adapters.fit import open_fitting, open_own
from megabatch.converters.adapters.open import require_one
from megabatch.converters.adapters.peft_folder import is_peft
from megabatch.converters.adapters.targets import (
    MERGES_ONE_OF_TWO,
    Target,
    changes_one_of_two,
    find_targets,
    find_whole,
    hf_names,
    module_of,
)
from megabatch.converters.families import family_named
from megabatch.converters.folder_kinds import Kind, kinds_of
from megabatch.converters.frozen import Freezing, frozen_names
from megabatch.converters.mapping import Mapped
from megabatch.entry.model import fault_of
from megabatch.entry.steps_left import not_to_go_on
from megabatch.errors import CheckpointError, ConversionError, Fault
from megabatch.plan.shape import ModelShape
from megabatch.saved.find import FoundCheckpoint, find_to_load


def tuning_faults(recipe: Recipe, shape: ModelShape | None) -> Iterator[Fault]:
    """Faults of names, by the model's table; none if its shape is unknown."""
    if shape is None:
        return
    table = family_named(shape.model_type).tensors(shape)
    yield from _references(recipe, shape, table)
    if recipe.tuner.tuner_type == "lora":
        yield from _adapters(recipe, shape, table)
    else:
        yield from _frozen(recipe, table)


def _frozen(recipe: Recipe, table: Sequence[Mapped]) -> Iterator[Fault]:
    try:
        frozen = frozen_names(table, Freezing.of(recipe.tuner))
    except ConversionError as error:
        field, _, what = str(error).partition(": ")
        yield Fault(f"tuner.{field}:", None, what, bare=True)
        return
    yield from _new_tokens_learn(recipe, table, {mapped.name for mapped in table} - frozen)


def _new_tokens_learn(recipe: Recipe, table: Sequence[Mapped], trained: Collection[str]) -> Iterator[Fault]:
    """Rows of new tokens that nothing trains would stay the mean of the others."""
    still = [mapped for mapped in table if mapped.split == "vocab" and mapped.name not in trained]
    if not recipe.model.new_special_tokens or not still:
        return
    module = module_of(still[0])
    name = module.rpartition(".")[2]
    if recipe.tuner.tuner_type != "lora":
        fix = f"add {module!r} to tuner.trainable_parameters"
    elif not any(mapped.name == "output_layer.weight" for mapped in table):
        fix = "adapters of an embedding that is the output layer too are not built, so set tuner.tuner_type='full'"
    elif recipe.bridge.merge_lora is False:
        fix = f"add {name!r} to tuner.modules_to_save, the rows that a PEFT folder holds"
    else:
        fix = f"add {name!r} to tuner.modules_to_save or tuner.target_modules"
    rule = f"{name} is frozen, so its new rows learn nothing; {fix}"
    yield Fault("model.new_special_tokens:", None, rule, bare=True)


def _adapters(recipe: Recipe, shape: ModelShape, table: Sequence[Mapped]) -> Iterator[Fault]:
    tuner = recipe.tuner
    try:
        targets = find_targets(
            table, tuner.target_modules, regex=tuner.target_regex, rank=tuner.lora_rank, fused=tuner.lora_fused
        )
    except ConversionError as error:
        yield fault_of("tuner.target_modules" if tuner.target_regex is None else "tuner.target_regex", error)
        return
    if recipe.bridge.merge_lora is not False and changes_one_of_two(shape, targets):
        yield Fault("bridge.merge_lora", recipe.bridge.merge_lora, MERGES_ONE_OF_TWO, try_=(False,))
    try:
        whole = find_whole(table, tuner.modules_to_save, biases=tuner.lora_bias == "all")
    except ConversionError as error:
        yield fault_of("tuner.modules_to_save", error)
        return
    adapted = {target.weight.name for target in targets} if recipe.bridge.merge_lora is not False else set()
    yield from _new_tokens_learn(recipe, table, whole | adapted)
    given = [*(("bridge.adapters", folder) for folder in recipe.bridge.adapters)]
    if tuner.adapter_load is not None:
        given.append(("tuner.adapter_load", tuner.adapter_load))
    for field, folder in given:
        try:
            _require_fit(Path(folder).expanduser(), recipe, shape, targets, hf_names(table, whole))
        except (ConversionError, CheckpointError) as error:
            yield fault_of(field, error)
            continue
        if field == "tuner.adapter_load" and (found := _checkpoint(Path(folder).expanduser(), recipe)) is not None:
            yield from not_to_go_on(field, folder, found, recipe)


def _references(recipe: Recipe, shape: ModelShape, table: Sequence[Mapped]) -> Iterator[Fault]:
    given = [("bridge.ref_adapters", folder) for folder in recipe.bridge.ref_adapters]
    if recipe.rlhf.ref_adapter_load is not None:
        given.append(("rlhf.ref_adapter_load", recipe.rlhf.ref_adapter_load))
    for field, folder in given:
        try:
            open_own(Path(folder).expanduser(), Tables(family_named(shape.model_type), shape), table)
        except (ConversionError, CheckpointError) as error:
            yield fault_of(field, error)


def _require_fit(
    folder: Path, recipe: Recipe, shape: ModelShape, targets: Sequence[Target], whole: Collection[str]
) -> None:
    """Raises: ConversionError, CheckpointError for an adapter that the run cannot start from."""
    tuner = recipe.tuner
    scale = scale_of(tuner.lora_alpha, tuner.lora_rank, use_rslora=tuner.use_rslora)
    require_one(folder)
    if not is_peft(folder):
        if Kind.MODEL in kinds_of(folder):
            what, flag = Kind.MODEL.value
            raise ConversionError(f"{folder} is {what}, not {Kind.ADAPTER.value[0]}; name it as {flag}")
        found = _checkpoint(folder, recipe)
        if found is None:
            return
        folder = found.weights if found.of_a_run else folder
    open_fitting(folder, Tables(family_named(shape.model_type), shape), targets, scale=scale, whole=whole)


def _checkpoint(folder: Path, recipe: Recipe) -> FoundCheckpoint | None:
    """The checkpoint that an adapter is read from; None for a PEFT folder, and where none is required. Raises:
    CheckpointError."""
    if is_peft(folder):
        return None
    return find_to_load(str(folder), may_be_missing=not recipe.checkpoint.exit_on_missing_checkpoint)
