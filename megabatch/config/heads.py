"""The head of a recipe's model: what stands in place of the output layer, by the task."""

from __future__ import annotations

import re
from dataclasses import replace

from megabatch.config.recipe import Recipe
from megabatch.config.training import ProblemType
from megabatch.plan.shape import ModelShape

_CLASS = re.compile(r"(ForCausalLM|ForSequenceClassification|ForTokenClassification|Model)$")


def labels_of(recipe: Recipe) -> int | None:
    """Outputs of the head that the recipe's task trains, 0 for hidden states; None for a language model."""
    if recipe.kind is None:
        return None
    head = recipe.kind.head
    return recipe.training.num_labels if head == "num_labels" else head


def problem_type(recipe: Recipe) -> ProblemType | None:
    """Kind of sequence classification, the recipe's or that of its number of scores; None without scores."""
    given, labels = recipe.training.problem_type, labels_of(recipe)
    if given is not None or not labels or _scores_tokens(recipe):
        return given
    return "regression" if labels == 1 else "single_label_classification"


def with_head(recipe: Recipe, shape: ModelShape) -> ModelShape:
    """The shape of the model that is trained, from the one that the recipe names; unchanged for a language model."""
    labels = labels_of(recipe)
    if labels is None:
        return shape
    bias = _scores_tokens(recipe)
    ending = "Model" if not labels else "ForTokenClassification" if bias else "ForSequenceClassification"
    return replace(shape, num_labels=labels, head_bias=bias, architecture=_CLASS.sub(ending, shape.architecture))


def head_fault(recipe: Recipe, shape: ModelShape) -> str | None:
    """Why a model cannot be the start of this recipe's, by its head. Args: `shape`: the model's own."""
    wanted, found = labels_of(recipe), shape.num_labels
    if found == 0 and wanted is None:
        return "it is an embedding model, which has no output layer"
    if not found or wanted == 0:
        return None
    if wanted == found:
        return _other_kind(recipe, shape)
    has = f"its score head has {found} output{'s' if found > 1 else ''}"
    if wanted is None:
        return f"{has} and it has no output layer; name a language model, or train a task with a head"
    return f"{has}, and this run's has {wanted}; name a language model for a new head"


def _other_kind(recipe: Recipe, shape: ModelShape) -> str | None:
    """Why a score head of the right number of outputs is of the wrong kind."""
    if shape.head_bias == _scores_tokens(recipe):
        return None
    has, wants = ("a", "none") if shape.head_bias else ("no", "one")
    return (
        f"its score head has {has} bias, and this run's has {wants}: transformers gives one to heads that score each "
        "token and none to those that score a sequence; name a language model for a new head"
    )


def _scores_tokens(recipe: Recipe) -> bool:
    return recipe.kind is not None and recipe.kind.scores_tokens
