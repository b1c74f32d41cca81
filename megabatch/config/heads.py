"""The head of a recipe's model: what stands in place of the output layer, by the task."""

from __future__ import annotations

import re
from dataclasses import replace

from megabatch.config.recipe import Recipe
from megabatch.config.training import ProblemType
from megabatch.plan.shape import ModelShape

_CLASS = re.compile(r"(ForCausalLM|ForSequenceClassification|Model)$")


def labels_of(recipe: Recipe) -> int | None:
    """Outputs of the head that the recipe's task trains, 0 for hidden states; None for a language model."""
    if recipe.kind is None:
        return None
    head = recipe.kind.head
    return recipe.training.num_labels if head == "num_labels" else head


def problem_type(recipe: Recipe) -> ProblemType | None:
    """Kind of sequence classification, the recipe's or that of its number of scores; None without scores."""
    given, labels = recipe.training.problem_type, labels_of(recipe)
    if given is not None or not labels:
        return given
    return "regression" if labels == 1 else "single_label_classification"


def with_head(recipe: Recipe, shape: ModelShape) -> ModelShape:
    """The shape of the model that is trained, from the one that the recipe names; unchanged for a language model."""
    labels = labels_of(recipe)
    if labels is None:
        return shape
    ending = "ForSequenceClassification" if labels else "Model"
    return replace(shape, num_labels=labels, architecture=_CLASS.sub(ending, shape.architecture))


def head_fault(recipe: Recipe, shape: ModelShape) -> str | None:
    """Why a model cannot be the start of this recipe's, by its head. Args: `shape`: the model's own."""
    wanted, found = labels_of(recipe), shape.num_labels
    if found == 0 and wanted is None:
        return "it is an embedding model, which has no output layer"
    if not found or wanted in (found, 0):
        return None
    has = f"its score head has {found} output{'s' if found > 1 else ''}"
    if wanted is None:
        return f"{has} and it has no output layer; name a language model, or train a task with a head"
    return f"{has}, and this run's has {wanted}; name a language model for a new head"
