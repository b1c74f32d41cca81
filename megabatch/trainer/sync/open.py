"""The rollout engines that a recipe asks for."""

from __future__ import annotations

import torch

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.rollout.local.transformers_engine import TransformersEngine
from megabatch.trainer.data.dataset import share_of
from megabatch.trainer.model.transformer_config import DTYPES
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.sync.rollouts import Rollouts

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Of log-probabilities, where a recipe sets none. Engines round at other places than the trainer: in float32 they
differ by 1e-5, in bfloat16 by up to 0.24."""


def open_rollouts(run: RunConfig, source: ModelSource, ranks: Ranks) -> Rollouts:
    """The engines of a run, without weights; collective. Raises: RolloutError on every rank."""
    dtype = DTYPES[resolved(run.recipe.model.torch_dtype)]
    tolerance = run.recipe.rollout.sync_tolerance
    engine = TransformersEngine(source.config_folder, dtype=dtype, device=ranks.device)
    return Rollouts(
        engine,
        ranks,
        source.family,
        experts=engine.experts,
        share=share_of(run, ranks),
        tolerance=_TOLERANCE[dtype] if tolerance is None else tolerance,
    )
