"""Text embeddings: a vector for each text, close for texts that belong together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from megabatch.config.embedding import Embedding as Group
from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.ranked import embedding_fault
from megabatch.data.tokens.ranked import LABEL, NEGATIVE, POSITIVE, ROLE
from megabatch.errors import DataError
from megabatch.trainer.data.dataset import open_tokens, steps_of
from megabatch.trainer.evaluation.ranking import of_embeddings
from megabatch.trainer.evaluation.whole_set import with_measures
from megabatch.trainer.exports.embedding import embedding_export
from megabatch.trainer.exports.of_run import export_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.contrastive import Contrastive, Losses, Matryoshka
from megabatch.trainer.objectives.embedding_losses import InfoNce, contrastive, cosine_similarity, online_contrastive
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.pooled import Pooled
from megabatch.trainer.tasks.parts import Parts


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    """Raises: DataError, also for rows that lack what the loss needs."""
    group = run.recipe.embedding
    ranking = _ranking(group)
    losses = Matryoshka(_losses(group, ranking), {None: 1.0, **_first_dimensions(group)})
    objective = Contrastive(losses, Pooled(group.pooling, run.shape.hidden_size), ranking=ranking)
    tokens = open_tokens(run, source, ranks, busy=busy)
    for data in (tokens.train, tokens.validation):
        if data is not None:
            require_fitting(data, group)
    steps, evaluator = steps_of(run, ranks, tokens, objective)
    export = embedding_export(run, source, export_of(run, source))
    measured = with_measures(evaluator, of_embeddings(group.loss_type))
    return Parts(steps=steps, objective=objective, evaluator=measured, export=export)


def _ranking(group: Group) -> InfoNce | None:
    if group.loss_type != "infonce":
        return None
    margin = group.infonce_fake_neg_margin if group.infonce_mask_fake_negative else None
    return InfoNce(
        temperature=group.infonce_temperature, use_batch=group.infonce_use_batch, fake_negative_margin=margin
    )


def _losses(group: Group, ranking: InfoNce | None) -> Losses:
    if ranking is not None:
        return ranking.losses
    if group.loss_type == "cosine_similarity":
        return cosine_similarity
    of = contrastive if group.loss_type == "contrastive" else online_contrastive
    return partial(of, margin=group.contrastive_margin)


def _first_dimensions(group: Group) -> dict[int | None, float]:
    return dict(zip(group.mrl_dims, group.mrl_weights or [1.0] * len(group.mrl_dims), strict=True))


def require_fitting(data: TokenCache, group: Group) -> None:
    """Raises: DataError naming the first row that lacks what the loss needs, or has what it does not read."""
    roles, labels = data.columns[ROLE], data.columns[LABEL][data.items[:-1]]
    positives, negatives = (
        np.add.reduceat((roles == role).astype(np.int64), data.items[:-1]) for role in (POSITIVE, NEGATIVE)
    )
    rows = zip(positives.tolist(), negatives.tolist(), labels.tolist(), strict=True)
    faults = [embedding_fault(group, positives=p, negatives=n, label=label) for p, n, label in rows]
    if found := [number for number, fault in enumerate(faults) if fault is not None]:
        place, rule = data.place(*data.origins[data.items[found[0]]].tolist()), faults[found[0]]
        raise DataError(f"{place}: {rule} ({faults.count(rule):,} of {len(faults):,} rows)")
