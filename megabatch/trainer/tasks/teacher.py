"""The model that a student learns from: another one of any shape, at the run's layout."""

from __future__ import annotations

import logging
from dataclasses import replace

from megabatch.config.run import RunConfig
from megabatch.converters.hf_model import open_hf_model
from megabatch.data.run_tokenizer import folder_of
from megabatch.errors import ConfigError, MegabatchError
from megabatch.trainable import VOCABULARY_ROUNDED
from megabatch.trainer.assemble import frozen_model
from megabatch.trainer.model.build import Model
from megabatch.trainer.model_source import ModelSource, model_source
from megabatch.trainer.ranks import Ranks

logger = logging.getLogger(__name__)


def teacher_of(run: RunConfig, name: str, source: ModelSource, ranks: Ranks) -> Model:
    """A frozen model from a folder or a hub; collective. Args: source: the student's.

    Raises: ConfigError, ConversionError on every rank, also for a vocabulary that is not the student's.
    """
    folder = ranks.on_main(lambda: folder_of(name, run))
    shape = open_hf_model(folder, compare_duplicates=False).shape
    if abs(shape.vocab_size - run.shape.vocab_size) >= VOCABULARY_ROUNDED:
        raise ConfigError(
            f"gkd.teacher_model={name!r} has {shape.vocab_size:,} tokens and the student {run.shape.vocab_size:,}: "
            "distillation compares tokens by their ids, so both must have one tokenizer"
        )
    recipe = run.recipe
    alone = replace(
        recipe,
        model=replace(
            recipe.model,
            model=str(folder),
            model_type=None,
            tokenizer=str(source.tokenizer),
            padded_vocab_size=None,
            new_special_tokens=(),
        ),
        parallel=replace(
            recipe.parallel,
            decoder_first_pipeline_num_layers=None,
            decoder_last_pipeline_num_layers=None,
            pipeline_model_parallel_layout=None,
        ),
    )
    own = replace(run, recipe=alone, shape=shape)
    logger.info("the teacher is %s", name)
    try:
        return frozen_model(own, ranks, model_source(own, ranks))
    except MegabatchError as e:
        raise type(e)(f"gkd.teacher_model={name!r}: {e}") from e
