"""Models beside the trained one, which a recipe names: whether they are there, whole, and fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megabatch.config.layout import virtual_stages
from megabatch.config.recipe import Recipe
from megabatch.config.rules.preference import without_reference
from megabatch.config.rules.second_layouts import lacks_tokens, model_divides
from megabatch.config.second_layouts import TEACHER
from megabatch.config.several_teachers import models_named
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.entry.model import FoundModel, downloaded, find_model, nearest_folder, rows_needed
from megabatch.errors import CheckpointError, DataError, Fault, MegabatchError
from megabatch.hub_cache import download_command, is_hub_name
from megabatch.plan.shape import ModelShape
from megabatch.saved.find import find_to_load
from megabatch.trainable import VOCABULARY_ROUNDED


def other_model_faults(
    recipe: Recipe, shape: ModelShape | None, *, shared_cache: str | None = None
) -> Iterator[Fault]:
    """Faults of a reference, a teacher and reward models that names and config.json show.

    Args: shape: the trained model's; shared_cache: the profile's, where the run looks for models of a hub.
    """
    if without_reference(recipe) is None:
        if recipe.bridge.ref_model is not None:
            yield from _reference(recipe, recipe.bridge.ref_model, shape, shared_cache=shared_cache)
        if recipe.rlhf.ref_load is not None:
            yield from _checkpoint("rlhf.ref_load", recipe.rlhf.ref_load)
    if recipe.kind is not None and recipe.kind.generates:
        for name in recipe.grpo.reward_model:
            yield from _reward_model(name, shared_cache=shared_cache)
    if has_teacher(recipe):
        for name in models_named(recipe.gkd.teacher_model):
            yield from _teacher(recipe, name, shape, shared_cache=shared_cache)


def damaged_other_models(
    recipe: Recipe, *, tokenizer: Path | None, shared_cache: str | None = None
) -> Iterator[Fault]:
    """Faults of their weights and tokenizers. Args: tokenizer: the trained model's folder of it, if it is here."""
    given: list[tuple[str, str | None]] = []
    if without_reference(recipe) is None:
        given.append(("bridge.ref_model", recipe.bridge.ref_model))
    if has_teacher(recipe):
        given += [("gkd.teacher_model", name) for name in models_named(recipe.gkd.teacher_model)]
    for field, name in given:
        if name is None:
            continue
        found = found_beside(recipe, name, shared_cache=shared_cache)
        if found.folder is None or found.fault is not None:
            continue  # a fault of names or of config.json is said already
        from megabatch.converters.hf_model import open_hf_model  # a dry run reads no weights

        try:
            open_hf_model(found.folder, compare_duplicates="sampled")
        except MegabatchError as error:
            yield Fault(field, name, f"cannot be read: {error}")
        if tokenizer is not None and (differs := _tokenizers_differ(found.folder, tokenizer)):
            yield Fault(field, name, f"has another tokenizer than the trained model, whose ids it reads: {differs}")


def _tokenizers_differ(folder: Path, own: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # the trainer reads one of them alone
        return tokenizers.difference(folder, own)
    return None


def has_teacher(recipe: Recipe) -> bool:
    """Whether its task may have one."""
    return recipe.kind is not None and recipe.kind.name in ("gkd", "grpo")


def _reference(recipe: Recipe, name: str, shape: ModelShape | None, *, shared_cache: str | None) -> Iterator[Fault]:
    """A reference has the policy's tokenizer, and gets its new tokens too."""
    tokenizer = recipe.model.tokenizer or recipe.model.model
    field = "bridge.ref_model"
    own = replace(recipe, model=replace(recipe.model, model=name, tokenizer=tokenizer))
    found = find_model(own, shared_cache=shared_cache)
    if fault := _missing(field, name, found):
        yield fault
    elif found.shape is not None and shape is not None and (differs := _differences(found.shape, shape)):
        yield Fault(field, name, f"must be a model of the policy's shape, and has {differs}")


def _teacher(recipe: Recipe, name: str, shape: ModelShape | None, *, shared_cache: str | None) -> Iterator[Fault]:
    field, found = "gkd.teacher_model", found_beside(recipe, name, shared_cache=shared_cache)
    if fault := _missing(field, name, found):
        yield fault
    elif found.shape is not None and shape is not None:
        own, student, family = found.shape.vocab_size, shape.vocab_size, recipe.gkd.teacher_model_type
        if family not in (None, found.shape.model_type):
            rule = f"is not the family of teacher_model={name!r}"
            yield Fault("gkd.teacher_model_type", family, rule, try_=(f"{found.shape.model_type!r}",))
        if abs(own - student) >= VOCABULARY_ROUNDED:
            rule = (
                f"has {own:,} tokens and the student {student:,}: distillation compares tokens by their ids, so both "
                "must have one tokenizer"
            )
            yield Fault(field, name, rule)
        if own < student:
            with suppress(DataError):  # it is a fault of the student's own, or the trainer reads the tokenizer
                rows = min(rows_needed(recipe, shared_cache=shared_cache), student)
                are_new = bool(recipe.model.new_special_tokens)
                if fault := lacks_tokens(name, found.shape, rows=rows, are_new=are_new):
                    yield fault
        chunks = virtual_stages(recipe.parallel, shape.num_layers)
        yield from model_divides(recipe, TEACHER, found.shape, chunks=chunks)


_SCORES = ("ForSequenceClassification", "ForTokenClassification")


def _reward_model(name: str, *, shared_cache: str | None) -> Iterator[Fault]:
    """Any classifier of transformers, always from Hugging Face's hub."""
    from megabatch.converters.hf_model import read_config  # few tasks have one

    field, folder = "grpo.reward_model", Path(name).expanduser()
    if not folder.is_dir():
        if not is_hub_name(name):
            yield Fault(field, name, f"does not exist{nearest_folder(folder)}")
            return
        found = downloaded(name, use_hf=True, shared_cache=shared_cache)
        if found is None:
            fix = download_command(name, use_hf=True)
            yield Fault(field, name, f"is neither a local folder nor downloaded; run first: {fix}")
            return
        folder = found
    try:
        named = read_config(folder).get("architectures")
    except MegabatchError as error:
        yield Fault(field, name, f"cannot be loaded: {error}")
        return
    if isinstance(named, list) and named and not str(named[0]).endswith(_SCORES):
        rule = f"must be a classifier, and is {named[0]}; a run of rlhf_type=rm exports one from such a model"
        yield Fault(field, name, rule)


def found_beside(recipe: Recipe, name: str, *, shared_cache: str | None = None) -> FoundModel:
    """What is known of another model, with its own vocabulary."""
    own = replace(recipe, model=replace(recipe.model, model=name, tokenizer=None, new_special_tokens=()))
    return find_model(own, shared_cache=shared_cache)


def _missing(field: str, name: str, found: FoundModel) -> Fault | None:
    """A model of a hub may be downloaded by the run."""
    if found.fault is not None:
        return Fault(field, name, f"cannot be used: {str(found.fault).removeprefix('model.model: ')}")
    if found.shape is not None or is_hub_name(name):
        return None
    return Fault(field, name, f"does not exist{nearest_folder(Path(name).expanduser())}")


def _checkpoint(field: str, path: str) -> Iterator[Fault]:
    try:
        find_to_load(path, may_be_missing=False)
    except CheckpointError as error:
        yield Fault(field, path, f"cannot be loaded: {str(error).partition('; or set exit_on_missing')[0]}")


def _differences(found: ModelShape, policy: ModelShape) -> str:
    """`num_layers=4 and not 2`, for each number that differs."""
    names = [name for name in policy.__slots__ if name != "hf_config"]
    return ", ".join(
        f"{name}={getattr(found, name)!r} and not {getattr(policy, name)!r}"
        for name in names
        if getattr(found, name) != getattr(policy, name)
    )
