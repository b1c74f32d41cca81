"""Text embeddings: a vector for each text, close for texts that belong together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from megabatch.config.embedding import Embedding as Group
from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.tokens.ranked import LABEL, NEGATIVE, POSITIVE, ROLE
from megabatch.errors import DataError
from megabatch.trainer.data.dataset import open_tokens, steps_of
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
    export = embedding_export(run, export_of(run, source))
    return Parts(steps=steps, objective=objective, evaluator=evaluator, export=export)


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
    roles, labels = data.columns[ROLE], data.columns[LABEL]
    count: dict[float, np.ndarray] = {
        role: np.add.reduceat((roles == role).astype(np.int64), data.items[:-1]) for role in (POSITIVE, NEGATIVE)
    }
    first = data.items[:-1]
    _refuse(data, count[POSITIVE] != 1, "must have one positive text; make a row for each")
    if group.loss_type == "infonce":
        if not group.infonce_use_batch:
            _refuse(data, count[NEGATIVE] == 0, "has no negative text, and embedding.infonce_use_batch is False")
        return
    name = f"embedding.loss_type={group.loss_type!r}"
    _refuse(data, np.isnan(labels[first]), f"has no label, which {name} needs")
    _refuse(data, count[NEGATIVE] > 0, f"has negative texts, which {name} does not read; give them a label")
    if group.loss_type == "cosine_similarity":
        _refuse(data, np.abs(labels[first]) > 1, "has a label that is no cosine, from -1 to 1")
    else:
        _refuse(data, ~np.isin(labels[first], (0, 1)), f"has another label than 0 and 1, which {name} needs")


def _refuse(data: TokenCache, rows: np.ndarray, rule: str) -> None:
    if len(found := np.flatnonzero(rows)):
        place = data.place(*data.origins[data.items[found[0]]].tolist())
        raise DataError(f"{place}: {rule} ({len(found):,} of {len(rows):,} rows)")
