"""What is measured of a whole evaluation set, for each kind of scores that tasks have.

M: sequences. R: rows. L: labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megabatch.config.training import ProblemType
from megabatch.data.rows.labels import label_columns
from megabatch.data.tokens.candidates import FITS
from megabatch.data.tokens.ranked import ANCHOR, LABEL, NEGATIVE, POSITIVE, ROLE
from megabatch.data.tokens.steps import RIGHT
from megabatch.trainer.evaluation import measures
from megabatch.trainer.evaluation.whole_set import ITEM, POSITION, Measures
from megabatch.trainer.objectives.objective import REFERENCE
from megabatch.trainer.pack import Pack

Arrays = Mapping[str, np.ndarray]
FIRST = (1, 5, 10)
"""Places that `recall_at_…` looks at."""
_RANKED = ("mrr", "map", *(f"recall_at_{k}" for k in FIRST), "ndcg_at_10")
_PROBABLE = ("ece", "brier")
_DECIMALS = 6
"""Cosines are compared to so many: a text that two rows have gets the same place in both."""
_ANCHORS_AT_ONCE = 1024
GOOD, PROMPT = "label", "prompt"
_DIGEST_BYTES = 6
"""Of a prompt's number, which fp64 then holds."""


def of_classifier(problem_type: ProblemType, num_labels: int) -> Measures:
    """
    | problem_type | measured besides the means over samples |
    | --- | --- |
    | regression | `pearson`, `spearman`, `r2`: means over the outputs |
    | single_label_classification | `f1_macro`, `auc` (one class against the rest, their mean), `ece`, `brier` |
    | multi_label_classification | `f1_macro`, `auc`, `brier`: means over the labels |
    """
    of = {
        "regression": (_regression, ("pearson", "spearman", "r2")),
        "single_label_classification": (_single_label, ("f1_macro", "auc", *_PROBABLE)),
        "multi_label_classification": (_multi_label, ("f1_macro", "auc", "brier")),
    }
    measured, names = of[problem_type]
    columns = label_columns(problem_type, num_labels)
    if problem_type == "single_label_classification" and num_labels > 2:
        names = (*names, "f1")
    return Measures(["scores"], columns, names, lambda found: measured(found["scores"], _stacked(found, columns)))


def _stacked(found: Arrays, columns: list[str] | tuple[str, ...]) -> np.ndarray:
    return np.stack([found[name] for name in columns], axis=1)


def _regression(scores_ML: np.ndarray, labels_ML: np.ndarray) -> dict[str, float]:
    pairs = list(zip(scores_ML.T, labels_ML.T, strict=True))
    of = {"pearson": measures.pearson, "spearman": measures.spearman, "r2": measures.r2}
    return {name: measures.mean([one(*pair) for pair in pairs]) for name, one in of.items()}


def _single_label(scores_ML: np.ndarray, labels_M1: np.ndarray) -> dict[str, float]:
    true_M: np.ndarray = labels_M1[:, 0].astype(int)
    chances_ML = measures.softmax(scores_ML)
    said_M, classes = scores_ML.argmax(1), scores_ML.shape[1]
    macro = measures.mean(measures.f1_by_class(said_M, true_M, classes))
    found = {"f1_macro": macro, "f1": macro}
    found["ece"] = measures.calibration_error(chances_ML.max(1), said_M == true_M)
    if classes == 2:
        found["auc"] = measures.auc(chances_ML[:, 1], true_M)
        return found | {"brier": measures.brier(chances_ML[:, 1], true_M)}
    found["auc"] = measures.mean([measures.auc(chances_ML[:, c], true_M == c) for c in range(classes)])
    return found | {"brier": measures.brier_of_classes(chances_ML, true_M)}


def _multi_label(scores_ML: np.ndarray, labels_ML: np.ndarray) -> dict[str, float]:
    said_ML, true_ML = scores_ML > 0, labels_ML > 0.5
    return {
        "f1_macro": measures.mean(measures.f1_of_labels(said_ML, true_ML)),
        "auc": measures.mean([measures.auc(*pair) for pair in zip(scores_ML.T, true_ML.T, strict=True)]),
        "brier": measures.brier(measures.sigmoid(scores_ML), true_ML),
    }


def of_rewards() -> Measures:
    """`auc`: how often any chosen answer is above any rejected one, of whatever pair. `ece` and `brier` of the
    probability sigmoid(r_chosen - r_rejected) that the chosen answer of a pair is the better one."""
    return Measures(["scores"], [], ("auc", *_PROBABLE), _rewards)


def _rewards(found: Arrays) -> dict[str, float]:
    rewards_M = found["scores"][:, 0]
    chances_P = measures.sigmoid(rewards_M[0::2] - rewards_M[1::2])
    return {
        "auc": measures.auc(rewards_M, np.arange(len(rewards_M)) % 2 == 0),
        "ece": measures.calibration_error(np.maximum(chances_P, 1 - chances_P), chances_P > 0.5),
        "brier": measures.brier(chances_P, np.ones(len(chances_P))),
    }


def of_judged_answers() -> Measures:
    """`pair_accuracy`: of every good and every bad answer to one prompt, how often the good one gained more over the
    reference. A prompt is what comes before an answer's first learned token."""
    columns = [REFERENCE, GOOD]
    return Measures(["logps"], columns, ("pair_accuracy",), _judged, of_rows={PROMPT: prompts_of})


def _judged(found: Arrays) -> dict[str, float]:
    gained_M = found["logps"] - found[REFERENCE]
    return {"pair_accuracy": measures.pair_accuracy(gained_M, found[GOOD], found[PROMPT])}


def prompts_of(pack: Pack) -> Tensor:
    """A number for the prompt of each sequence, equal where prompts are: int64 [N]."""
    starts, ids, learned = pack.cu_seqlens_padded.tolist(), pack.ids_T.numpy(), pack.weights_T.numpy() > 0
    numbers = []
    for start, stop in pairwise(starts[: pack.sequences + 1]):
        prompt = ids[start : start + int(learned[start:stop].argmax()) + 1]
        numbers.append(int.from_bytes(blake2b(prompt.tobytes(), digest_size=_DIGEST_BYTES).digest()))
    return torch.tensor(numbers, dtype=torch.int64)


def of_steps() -> Measures:
    """Of all steps `f1_macro`, `auc`, and `ece` and `brier` of softmax's probability. Of answers `first_error`: the
    share whose first wrong step is found, or in which rightly none is (arXiv:2412.06559)."""
    return Measures(["scores"], [RIGHT], ("f1_macro", "auc", *_PROBABLE, "first_error"), _steps, per="token")


def _steps(found: Arrays) -> dict[str, float]:
    order = np.lexsort((found[POSITION], found[ITEM]))
    scores_M2, right_M, answers_M = found["scores"][order], found[RIGHT][order] > 0.5, found[ITEM][order]
    said_M = scores_M2.argmax(1) == 1
    starts = np.flatnonzero(np.diff(answers_M, prepend=-1))
    said, right = (np.split(values, starts[1:]) for values in (said_M, right_M))
    found_first = [float(_first_wrong(a) == _first_wrong(b)) for a, b in zip(said, right, strict=True)]
    return {**_single_label(scores_M2, right_M[:, None]), "first_error": measures.mean(found_first)}


def _first_wrong(right: np.ndarray) -> int:
    """Place of the first wrong step; -1 without one."""
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else -1


def of_reranker(*, probable: bool) -> Measures:
    """`mrr`, `map`, `recall_at_k` and `ndcg_at_10` of each query's documents; `auc` of all documents together.

    Args: probable: sigmoid(score) is a probability, so that there are `ece` and `brier` too.
    """
    names = (*_RANKED, "auc", *(_PROBABLE if probable else ()))
    return Measures(["scores"], [FITS], names, partial(_reranked, probable=probable))


def _reranked(found: Arrays, *, probable: bool) -> dict[str, float]:
    scores_M, fits_M, items_M = found["scores"][:, 0], found[FITS] > 0.5, found[ITEM]
    starts = np.flatnonzero(np.diff(items_M, prepend=-1))
    queries = np.split(np.arange(len(items_M)), starts[1:])
    rankings = [measures.places(scores_M[some])[fits_M[some]] for some in queries]
    values = {**measures.of_rankings(rankings, first=FIRST), "auc": measures.auc(scores_M, fits_M)}
    if probable:
        chances_M = measures.sigmoid(scores_M)
        values["ece"] = measures.calibration_error(np.maximum(chances_M, 1 - chances_M), (chances_M > 0.5) == fits_M)
        values["brier"] = measures.brier(chances_M, fits_M)
    return values


def of_embeddings(loss_type: str) -> Measures:
    """Of cosines, as sentence-transformers' evaluators measure them:

    | loss_type | measured |
    | --- | --- |
    | infonce | each anchor's positive among all positives and negatives of the set: `mrr`, `map`, `recall_at_k`, … |
    | cosine_similarity | `pearson` and `spearman` with the labels |
    | contrastive, online_contrastive | `auc` and `average_precision` of the pairs with label 1 |
    """
    of = {"infonce": (_retrieved, _RANKED), "cosine_similarity": (_similar, ("pearson", "spearman"))}
    measured, names = of.get(loss_type, (_told_apart, ("auc", "average_precision")))
    return Measures(["vectors"], [ROLE, LABEL], names, measured)


def _unit(found: Arrays) -> np.ndarray:
    vectors_MH = found["vectors"]
    return vectors_MH / np.maximum(np.linalg.norm(vectors_MH, axis=1, keepdims=True), 1e-12)


def _retrieved(found: Arrays) -> dict[str, float]:
    vectors_MH, roles_M = _unit(found), found[ROLE]
    anchors_RH, positives_RH = vectors_MH[roles_M == ANCHOR], vectors_MH[roles_M == POSITIVE]
    corpus_DH = np.concatenate([positives_RH, vectors_MH[roles_M == NEGATIVE]])
    own_R = (anchors_RH * positives_RH).sum(1).round(_DECIMALS)
    places = []
    for start in range(0, len(anchors_RH), _ANCHORS_AT_ONCE):
        some = slice(start, start + _ANCHORS_AT_ONCE)
        cosines = (anchors_RH[some] @ corpus_DH.T).round(_DECIMALS)
        places += (1 + (cosines > own_R[some, None]).sum(1)).tolist()
    return measures.of_rankings([np.array([place]) for place in places], first=FIRST)


def _pairs(found: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and label of each row."""
    vectors_MH, anchors = _unit(found), found[ROLE] == ANCHOR
    return (vectors_MH[anchors] * vectors_MH[found[ROLE] == POSITIVE]).sum(1), found[LABEL][anchors]


def _similar(found: Arrays) -> dict[str, float]:
    pairs = _pairs(found)
    return {"pearson": measures.pearson(*pairs), "spearman": measures.spearman(*pairs)}


def _told_apart(found: Arrays) -> dict[str, float]:
    cosines_R, labels_R = _pairs(found)
    return {
        "auc": measures.auc(cosines_R, labels_R == 1),
        "average_precision": measures.average_precision(cosines_R, labels_R == 1),
    }
