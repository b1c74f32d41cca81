"""The shape of a recipe's model, found without torch, transformers or a network."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from megabatch.config.heads import head_fault, with_head
from megabatch.config.new_model import declared_shape
from megabatch.config.recipe import Recipe
from megabatch.converters.families import family_named, family_of
from megabatch.converters.families.config_json import require_finite, require_loadable, with_vocabulary
from megabatch.data.tokens.new_tokens import FIELD, listed, rows_with
from megabatch.data.tokens.tokenizer import SPECIAL_TOKENS
from megabatch.errors import ConversionError, DataError, Fault, MegabatchError
from megabatch.hub_cache import cached_folder, download_command, is_hub_name
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.shape import ModelShape
from megabatch.slurm.environment import SHARED_CACHES
from megabatch.trainable import BUILT, untrainable
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class FoundModel:
    """What we know about the model before a run."""

    shape: ModelShape | None
    """None if nothing on this machine tells us; rules about the model are not checked then."""
    origin: str
    """Where the shape comes from, in words."""
    folder: Path | None = None
    """The weights, if they are on this machine."""
    fault: Fault | None = None
    """Why the shape could not be read."""


def find_model(recipe: Recipe, *, shared_cache: str | None = None) -> FoundModel:
    """The trained model's shape from its folder, a hub's cache or published facts; or as declared for a new model."""
    found = _own(recipe, shared_cache=shared_cache)
    if recipe.model.new_special_tokens:
        found = _with_new_tokens(found, recipe, shared_cache=shared_cache)
    return _with_head(found, recipe)


def _with_head(found: FoundModel, recipe: Recipe) -> FoundModel:
    """The model with the head of the recipe's task."""
    if found.shape is None:
        return found
    fault = found.fault
    if fault is None and (reason := head_fault(recipe, found.shape)) is not None:
        fault = Fault("model.model", recipe.model.model, f"cannot be trained on this task: {reason}")
    return replace(found, shape=with_head(recipe, found.shape), fault=fault)


def _own(recipe: Recipe, *, shared_cache: str | None) -> FoundModel:
    """The model as it is named, with its own head and vocabulary."""
    name = recipe.model.model
    if name is None:
        return _made(recipe)
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path.absolute())
    if is_hub_name(name):
        folder = _downloaded(name, recipe, shared_cache=shared_cache)
        if folder is not None:
            return _in_folder(folder)
        if name in KNOWN_MODELS:
            config = KNOWN_MODELS[name]
            shape = family_of(config).shape(config)
            return FoundModel(shape, "published config.json, not downloaded yet", fault=_untrainable("model", shape))
    return FoundModel(None, "not on this machine")


def _downloaded(name: str, recipe: Recipe, *, shared_cache: str | None) -> Path | None:
    return downloaded(name, use_hf=recipe.bridge.use_hf, shared_cache=shared_cache) if is_hub_name(name) else None


def downloaded(name: str, *, use_hf: bool, shared_cache: str | None) -> Path | None:
    """The folder of a hub's model in the cache that the ranks will look in; None where it is not there."""
    own = {cache.name: f"{shared_cache}/{cache.value}" for cache in SHARED_CACHES} if shared_cache else None
    return cached_folder(name, use_hf=use_hf, environment=own)


def _with_new_tokens(found: FoundModel, recipe: Recipe, *, shared_cache: str | None) -> FoundModel:
    """The model with a vocabulary that has `model.new_special_tokens` too."""
    if found.shape is None or found.fault is not None:
        return found
    try:
        rows = rows_needed(recipe, of=found.folder, shared_cache=shared_cache)
    except DataError as error:
        return replace(found, fault=fault_of(FIELD, error))
    shape = found.shape
    if rows <= shape.vocab_size:
        return found
    if recipe.model.model is None:
        rule = f"is too few for the {rows} tokens with model.new_special_tokens"
        return replace(found, fault=Fault("model.padded_vocab_size", shape.vocab_size, rule, try_=(rows,)))
    grown = replace(shape, vocab_size=rows, hf_config=with_vocabulary(shape.hf_config, rows))
    return replace(found, shape=grown)


def rows_needed(recipe: Recipe, *, of: Path | None = None, shared_cache: str | None = None) -> int:
    """Rows that the embedding needs for the tokenizer with the new tokens. Args: of: the model's folder, where it is
    found already. Raises: DataError."""
    model = recipe.model
    tokens = listed(model.new_special_tokens)
    name = model.tokenizer or model.model
    if name is None:  # it is trained, with the new tokens
        if there := {*tokens} & {*SPECIAL_TOKENS}:
            raise DataError(f"{FIELD}: {min(there)!r} is a token of every new tokenizer; leave it out")
        return 256 + len(SPECIAL_TOKENS) + len(tokens)
    folder: Path | None = Path(name).expanduser().absolute()
    if folder is not None and not folder.is_dir():
        own = of if model.tokenizer is None else None
        folder = own or _downloaded(name, recipe, shared_cache=shared_cache)
    if folder is None:
        raise DataError(
            f"{FIELD}: needs the tokenizer of {name} on this machine, to know how many rows the embedding gets; run "
            f"first: {download_command(name, use_hf=recipe.bridge.use_hf)}"
        )
    return rows_with(folder, tokens)


def nearest_folder(path: Path) -> str:
    """The end of a message about a folder that does not exist."""
    path = path.absolute()
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}; check the path"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=2, cutoff=0.5)
    return f"; nearest in {path.parent}: {', '.join(near)}" if near else "; check the path"


def fault_of(field: str, error: MegabatchError) -> Fault:
    """Turns an error that already names place and fix into a fault of a field."""
    return Fault(f"{field}:", None, str(error).removeprefix(f"{field}: "), bare=True)


def _made(recipe: Recipe) -> FoundModel:
    """A family's config.json fixes some of what a recipe declares (biases, norms on query and key)."""
    declared = declared_shape(recipe)
    if declared is None:
        return FoundModel(None, "not described")
    try:
        family = family_named(declared.model_type)
    except ConversionError as error:
        return FoundModel(None, "not known", fault=fault_of("model.model_type", error))
    if fault := _untrainable("model_type", declared):
        return FoundModel(None, "new", fault=fault)
    try:
        dtype = recipe.model.torch_dtype or "bfloat16"
        return FoundModel(family.shape(family.hf_config(declared, dtype=dtype)), "new")
    except (ConversionError, ArithmeticError, TypeError):
        return FoundModel(declared, "new")  # the rules report values that do not fit together


def find_shape(folder: Path) -> ModelShape | None:
    """The shape in a folder's config.json; None where there is none that we know."""
    return _in_folder(folder).shape if (folder / "config.json").is_file() else None


def _in_folder(folder: Path) -> FoundModel:
    from megabatch.converters.folder_kinds import adapter_fault
    from megabatch.converters.hf_model import read_config

    if reason := adapter_fault(folder):
        return FoundModel(None, f"an adapter in {folder}", folder, Fault("model.model:", None, reason, bare=True))
    try:
        config = read_config(folder)
        require_finite(config)
        family = family_of(config)
        if family.name in BUILT:  # of the others the run says that they are not
            require_loadable(config, model_type=family.name)
        shape = family.shape(config)
        return FoundModel(shape, f"config.json in {folder}", folder, _untrainable("model", shape))
    except ConversionError as error:
        return FoundModel(None, f"unreadable in {folder}", folder, fault_of("model.model", error))


def _untrainable(field: str, shape: ModelShape) -> Fault | None:
    """Families that we only convert, and settings of other families that the trainer does not implement."""
    reason = untrainable(shape)
    if reason is None:
        return None
    return Fault(
        f"model.{field}: {shape.architecture or shape.model_type}", None, f"cannot be trained: {reason}", bare=True
    )
