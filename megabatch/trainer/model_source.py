"""Where a run's model comes from: a Hugging Face folder, a hub, or none (a new model from its shape)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megabatch.config.heads import head_fault, with_head
from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.converters.engine.source_digests import check_folder
from megabatch.converters.families import family_named
from megabatch.converters.family import Family
from megabatch.converters.folder_kinds import adapter_fault
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.converters.shards import Source
from megabatch.data.run_tokenizer import NEW_MODEL, folder_of, new_model, tokenizer_of
from megabatch.errors import ConfigError
from megabatch.trainer.grown_vocabulary import GrownVocabulary
from megabatch.trainer.made_tensors import RandomWeights
from megabatch.trainer.model.build import Model
from megabatch.trainer.model.transformer_config import DTYPES
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import load

HEAD = frozenset({"output_layer.weight", "output_layer.bias"})
"""Canonical names of a head's weights, and of the output layer's."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model before training."""

    family: Family
    config_folder: Path
    """config.json and the other auxiliary files, which exported folders get too."""
    tokenizer: Path
    weights: HfModel | RandomWeights
    vocabulary: int | None = None
    """Rows of the embedding, where new tokens need more than the weights have."""
    seed: int = 0
    """Of a head that the model does not have yet."""

    def load(self, model: Model, ranks: Ranks) -> None:
        """Fills this rank's parameters; a head that the model has not is drawn from the seed."""
        if isinstance(self.weights, RandomWeights):
            table = self.family.tensors(model.shape)
            load(model, self.weights, table, ranks, dtype_of=self.weights.dtypes)
            return
        opened, table = self.weights, self.weights.tensors
        dtypes = {name: info.dtype for name, info in opened.folder.tensors.items()}
        source: Source = opened.folder
        if self.vocabulary is not None:
            source = grown = GrownVocabulary(opened.folder, table, rows=self.vocabulary)
            table = grown.table
        if opened.shape.num_labels == model.shape.num_labels:
            load(model, source, table, ranks, dtype_of=dtypes)
            return
        head = [mapped for mapped in self.family.tensors(model.shape) if mapped.name in HEAD]
        table = [*(mapped for mapped in table if mapped.name not in HEAD), *head]
        load(model, source, table, ranks, dtype_of=dtypes, only={mapped.name for mapped in table} - HEAD)
        std = float(opened.config.get("initializer_range") or 0.02)
        made = RandomWeights(self.family, model.shape, seed=self.seed, std=std)
        load(model, made, table, ranks, dtype_of=made.dtypes, only=HEAD)


def model_source(run: RunConfig, ranks: Ranks, *, tokenizer: Path | None = None) -> ModelSource:
    """Finds, downloads or creates the model that the run starts from; collective.

    The weights in a checkpoint's exported folder are checked against its digests, by each rank a share of them.

    Args: tokenizer: the run's, where `run` names another model beside the run's own; nothing is written for that one.
    Raises: ConfigError, DataError, ConversionError on every rank.
    """
    if (model := run.recipe.model.model) is None:
        return _made(run, ranks)
    folder = ranks.on_main(lambda: model_folder(model, run))
    is_own = tokenizer is None
    tokenizer = tokenizer or ranks.on_main(lambda: tokenizer_of(run))
    ranks.on_main(lambda: _prove(folder, run))
    ranks.each(lambda: check_folder(folder, share=ranks.place.rank, of=ranks.place.world_size))
    opened = open_hf_model(folder, compare_duplicates=False)
    config_folder = tokenizer if is_own and run.recipe.model.new_special_tokens else folder
    grown = run.shape.vocab_size if run.shape.vocab_size > opened.shape.vocab_size else None
    return ModelSource(opened.family, config_folder, tokenizer, opened, grown, run.recipe.training.seed)


def model_folder(name: str, run: RunConfig, *, revision: str | None = None) -> Path:
    """The local folder of a model, as `folder_of`. Raises: ConfigError, also for one with an adapter."""
    folder = folder_of(name, run, revision=revision)
    if reason := adapter_fault(folder):
        raise ConfigError(reason)
    return folder


def _prove(folder: Path, run: RunConfig) -> None:
    """One rank checks for all: the tensors, and that the shape is still the planned one."""
    own, old = open_hf_model(folder).shape, run.shape
    if reason := head_fault(run.recipe, own):
        raise ConfigError(f"model.model={folder} cannot be trained on this task: {reason}")
    new = with_head(run.recipe, own)
    if run.recipe.model.new_special_tokens and new.vocab_size < old.vocab_size:
        new = replace(new, vocab_size=old.vocab_size)
    if new != old:
        names = [n for n in old.__slots__ if n != "hf_config" and getattr(old, n) != getattr(new, n)]
        if names:
            changes = ", ".join(f"{n} {getattr(old, n)} → {getattr(new, n)}" for n in names)
            raise ConfigError(f"{folder}/config.json differs from the one that this run was planned with: {changes}")


def _made(run: RunConfig, ranks: Ranks) -> ModelSource:
    family = family_named(run.shape.model_type)
    folder = ranks.on_main(lambda: new_model(run))
    weights = RandomWeights(family, run.shape, seed=run.recipe.training.seed)
    if base_of_adapter(run) == str(folder):
        ranks.on_main(lambda: _save_base(weights, folder, run))
    return ModelSource(family, folder, folder, weights)


def base_of_adapter(run: RunConfig) -> str | None:
    """Name or folder of the model that the run's adapter belongs to: the recipe's, or the new one, whose weights the
    run keeps. None where a new model is not adapted, or begins with a checkpoint."""
    recipe = run.recipe
    if recipe.tuner.tuner_type != "lora" or recipe.model.model is not None or recipe.checkpoint.load is not None:
        return recipe.model.model
    return str(Path(run.run_dir) / NEW_MODEL)


def _save_base(weights: RandomWeights, folder: Path, run: RunConfig) -> None:
    """Once: nothing else says what an adapter of a new model was trained beside."""
    if not (file := folder / "model.safetensors").exists():
        weights.save(file, dtype=DTYPES[resolved(run.recipe.model.torch_dtype)])
