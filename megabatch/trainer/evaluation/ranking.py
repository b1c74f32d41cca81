"""What is measured of a whole set of rankings: documents by their scores, texts by the cosines of their vectors.

M: texts. R: rows. H: dimensions of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megabatch.data.tokens.candidates import FITS
from megabatch.data.tokens.ranked import ANCHOR, LABEL, NEGATIVE, POSITIVE, ROLE
from megabatch.trainer.evaluation import measures
from megabatch.trainer.evaluation.whole_set import ITEM, Arrays, Measures
from megabatch.trainer.evaluation.yes_or_no import OF_CHANCES, YesOrNo, of_part

_DECIMALS = 6
"""Cosines are compared to so many: a text that two rows have gets the same place in both."""
_ANCHORS_AT_ONCE = 1024
Pair = tuple[np.ndarray, np.ndarray]
"""Cosine and label of each row: [R] each."""
Rankings = Sequence[np.ndarray]
"""For each query the places of the documents that fit it."""


def _over_queries(measure: Callable[[np.ndarray], float]) -> Callable[[Rankings], float]:
    return lambda rankings: measures.mean([measure(one) for one in rankings])


_OF_RANKINGS = {
    "mrr": _over_queries(measures.reciprocal_rank),
    "map": _over_queries(measures.precision_over_places),
    **{f"recall_at_{k}": _over_queries(partial(measures.recall_at, first=k)) for k in (1, 5, 10)},
    "ndcg_at_10": _over_queries(partial(measures.ndcg_at, first=10)),
}


def of_reranker(*, probable: bool) -> Measures:
    """`mrr`, `map`, `recall_at_k` and `ndcg_at_10` of each query's documents; `auc` of all documents together.

    Args: probable: sigmoid(score) is a probability, so that there are `ece` and `brier` too.
    """
    of = {**of_part(_OF_RANKINGS, lambda found: found.rankings), "auc": Reranked.auc}
    of |= of_part(OF_CHANCES, lambda found: found.chances) if probable else {}
    return Measures(["scores"], [FITS], Reranked.of, of)


@dataclass(frozen=True)
class Reranked:
    """Documents with their scores, those of a query side by side."""

    scores_M: np.ndarray
    fits_M: np.ndarray
    """bool."""
    rankings: Rankings

    @classmethod
    def of(cls, found: Arrays) -> Reranked:
        scores_M, fits_M = found["scores"][:, 0], found[FITS] > 0.5
        starts = np.flatnonzero(np.diff(found[ITEM], prepend=-1))
        queries = np.split(np.arange(len(scores_M)), starts[1:])
        return cls(scores_M, fits_M, [measures.places(scores_M[some])[fits_M[some]] for some in queries])

    def auc(self) -> float:
        return measures.auc(self.scores_M, self.fits_M)

    @property
    def chances(self) -> YesOrNo:
        return YesOrNo(measures.sigmoid(self.scores_M), self.fits_M)


def of_embeddings(loss_type: str) -> Measures:
    """Of cosines, as sentence-transformers' evaluators measure them:

    | loss_type | measured |
    | --- | --- |
    | infonce | each anchor's positive among all positives and negatives of the set: `mrr`, `map`, `recall_at_k`, … |
    | cosine_similarity | `pearson` and `spearman` with the labels |
    | contrastive, online_contrastive | `auc` and `average_precision` of the pairs with label 1 |
    """
    outputs, columns = ["vectors"], [ROLE, LABEL]
    if loss_type == "infonce":
        return Measures(outputs, columns, _retrieved, _OF_RANKINGS)
    if loss_type == "cosine_similarity":
        return Measures(outputs, columns, _similar, _OF_SIMILARITIES)
    return Measures(outputs, columns, _alike, _OF_LIKENESS)


def _of_pair(measure: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Pair], float]:
    return lambda pair: measure(*pair)


_OF_SIMILARITIES = {"pearson": _of_pair(measures.pearson), "spearman": _of_pair(measures.spearman)}
_OF_LIKENESS = {"auc": _of_pair(measures.auc), "average_precision": _of_pair(measures.average_precision)}


def _unit(found: Arrays) -> np.ndarray:
    vectors_MH = found["vectors"]
    return vectors_MH / np.maximum(np.linalg.norm(vectors_MH, axis=1, keepdims=True), 1e-12)


def _retrieved(found: Arrays) -> Rankings:
    """The place of each anchor's positive."""
    vectors_MH, roles_M = _unit(found), found[ROLE]
    anchors_RH, positives_RH = vectors_MH[roles_M == ANCHOR], vectors_MH[roles_M == POSITIVE]
    corpus_DH = np.concatenate([positives_RH, vectors_MH[roles_M == NEGATIVE]])
    own_R = (anchors_RH * positives_RH).sum(1).round(_DECIMALS)
    places: list[int] = []
    for start in range(0, len(anchors_RH), _ANCHORS_AT_ONCE):
        some = slice(start, start + _ANCHORS_AT_ONCE)
        cosines = (anchors_RH[some] @ corpus_DH.T).round(_DECIMALS)
        places += (1 + (cosines > own_R[some, None]).sum(1)).tolist()
    return [np.array([place]) for place in places]


def _similar(found: Arrays) -> Pair:
    """Cosine and label of each row."""
    vectors_MH, anchors = _unit(found), found[ROLE] == ANCHOR
    return (vectors_MH[anchors] * vectors_MH[found[ROLE] == POSITIVE]).sum(1), found[LABEL][anchors]


def _alike(found: Arrays) -> Pair:
    """Cosine of each row, and whether its label is 1."""
    cosines_R, labels_R = _similar(found)
    return cosines_R, labels_R == 1
