"""The metrics of a run's evaluation by its recipe alone, so that the name of another is refused before the queue.

The trainer's objectives and measures of whole sets are where they come from (`trainer/objectives`,
`trainer/evaluation`); a test holds this table against both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megabatch.config.heads import problem_type
from megabatch.config.recipe import Recipe
from megabatch.values import dataclass

_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
_LOGPS = ("logps/chosen", "logps/rejected")
_RANKINGS = ("mrr", "map", "recall_at_1", "recall_at_5", "recall_at_10", "ndcg_at_10")
_CHANCES = ("ece", "brier")


@dataclass(frozen=True, slots=True)
class EvaluationMetrics:
    """Names without `eval_` before them."""

    names: Sequence[str]
    prefixes: Sequence[str] = ()
    """Beginnings of names that the data or the user's own code completes, such as `reward_` or `loss_`."""

    def __contains__(self, metric: str) -> bool:
        return metric in self.names or metric.startswith(tuple(self.prefixes))


def evaluation_metrics(recipe: Recipe) -> EvaluationMetrics | None:
    """None where the recipe does not say enough: a task that does not exist, a classifier without labels."""
    return None if recipe.kind is None else _OF_TASKS[recipe.kind.name](recipe)


def _of_tokens(recipe: Recipe) -> EvaluationMetrics:
    names = ("loss", "perplexity", *(("nll",) if recipe.training.enable_dft_loss else ()))
    return EvaluationMetrics(names, ("loss_",) if recipe.training.enable_channel_loss else ())


def _of_dpo(recipe: Recipe) -> EvaluationMetrics:
    imitates = "sft" in recipe.dpo.loss_types or recipe.dpo.rpo_alpha is not None
    return EvaluationMetrics(("loss", *_REWARDS, *_LOGPS, *(("nll_loss",) if imitates else ())))


def _of_gkd(recipe: Recipe) -> EvaluationMetrics:
    return EvaluationMetrics(("loss", "divergence", *(("nll_loss",) if recipe.gkd.sft_alpha else ())))


def _of_grpo(recipe: Recipe) -> EvaluationMetrics:
    """Completions are measured, and no loss is."""
    lengths = ("completion_length", "completion_length_max", "cut_off")
    several = () if recipe.grpo.num_generations_eval == 1 else ("pass_at_",)
    return EvaluationMetrics(("reward", *lengths), ("reward_", *several))


def _of_classes(recipe: Recipe) -> EvaluationMetrics | None:
    labels = recipe.training.num_labels
    if labels is None:
        return None
    match problem_type(recipe):
        case "regression":
            return EvaluationMetrics(("loss", "mse", "mae", "pearson", "spearman", "r2"))
        case "multi_label_classification":
            return EvaluationMetrics(("loss", "accuracy", "f1", "f1_macro", "auc", "brier"))
    return EvaluationMetrics(("loss", "accuracy", "f1", "f1_macro", "auc", *_CHANCES), ("f1_",) if labels > 2 else ())


def _of_embeddings(recipe: Recipe) -> EvaluationMetrics:
    match recipe.embedding.loss_type:
        case "infonce":
            return EvaluationMetrics(("loss", "cosine", "accuracy", *_RANKINGS))
        case "cosine_similarity":
            return EvaluationMetrics(("loss", "cosine", "pearson", "spearman"))
    return EvaluationMetrics(("loss", "cosine", "auc", "average_precision"))


def _of_rerankers(recipe: Recipe) -> EvaluationMetrics:
    chances = _CHANCES if recipe.reranker.loss_type == "pointwise_reranker" else ()
    return EvaluationMetrics(("loss", *_RANKINGS, "ndcg", "auc", *chances))


_OF_TASKS: Mapping[str, Callable[[Recipe], EvaluationMetrics | None]] = {
    "pt": _of_tokens,
    "sft": _of_tokens,
    "dpo": _of_dpo,
    "kto": lambda _: EvaluationMetrics(("loss", "kl", *_REWARDS, *_LOGPS, "pair_accuracy")),
    "rm": lambda _: EvaluationMetrics(("loss", "accuracy", "margin", "mean_reward", "auc", *_CHANCES)),
    "prm": lambda _: EvaluationMetrics(("loss", "accuracy", "f1_macro", "auc", *_CHANCES, "first_error")),
    "gkd": _of_gkd,
    "grpo": _of_grpo,
    "seq_cls": _of_classes,
    "embedding": _of_embeddings,
    "reranker": _of_rerankers,
    "generative_reranker": _of_rerankers,
}
