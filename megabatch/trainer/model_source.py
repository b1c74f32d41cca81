"""Where a run's model comes from: a Hugging Face folder, a hub, or none (a new model from its shape)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.converters.families import family_named
from megabatch.converters.family import Family
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.data.run_tokenizer import folder_of, new_model
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.errors import ConfigError
from megabatch.trainer.made_tensors import RandomWeights
from megabatch.trainer.model.build import Model
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import load


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model before training."""

    family: Family
    config_folder: Path
    """config.json and the other auxiliary files, which exported folders get too."""
    tokenizer: Path
    weights: HfModel | RandomWeights

    def load(self, model: Model, ranks: Ranks) -> None:
        """Fills this rank's parameters."""
        if isinstance(self.weights, RandomWeights):
            table = self.family.tensors(model.shape)
            load(model, self.weights, table, ranks, dtype_of=self.weights.dtypes)
        else:
            folder = self.weights.folder
            dtypes = {name: info.dtype for name, info in folder.tensors.items()}
            load(model, folder, self.weights.tensors, ranks, dtype_of=dtypes)


def model_source(run: RunConfig, ranks: Ranks) -> ModelSource:
    """Finds, downloads or creates the model that the run starts from; collective.

    Raises: ConfigError, DataError, ConversionError on every rank.
    """
    if (model := run.recipe.model.model) is None:
        return _made(run, ranks)
    folder = ranks.on_main(lambda: folder_of(model, run))
    tokenizer = ranks.on_main(lambda: folder_of(resolved(run.recipe.model.tokenizer), run))
    ranks.on_main(lambda: tokenizers.check(tokenizer))
    ranks.on_main(lambda: _prove(folder, run))
    opened = open_hf_model(folder, compare_duplicates=False)
    return ModelSource(opened.family, folder, tokenizer, opened)


def _prove(folder: Path, run: RunConfig) -> None:
    """One rank checks for all: the tensors, and that the shape is still the planned one."""
    opened = open_hf_model(folder)
    if opened.shape != run.shape:
        old, new = run.shape, opened.shape
        names = [n for n in old.__slots__ if n != "hf_config" and getattr(old, n) != getattr(new, n)]
        if names:
            changes = ", ".join(f"{n} {getattr(old, n)} → {getattr(new, n)}" for n in names)
            raise ConfigError(f"{folder}/config.json differs from the one that this run was planned with: {changes}")


def _made(run: RunConfig, ranks: Ranks) -> ModelSource:
    family = family_named(run.shape.model_type)
    folder, tokenizer = ranks.on_main(lambda: new_model(run))
    return ModelSource(family, folder, tokenizer, RandomWeights(family, run.shape, seed=run.recipe.training.seed))
