"""The metrics that a recipe's evaluation has by its variants, against the objectives and measures that give them.

`test_trained_runs` compares those of whole evaluations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megabatch import Dpo, Embedding, Gkd, Grpo, Recipe, Reranker, Rlhf, Training
from megabatch.config.evaluation_metrics import EvaluationMetrics, evaluation_metrics
from megabatch.config.training import ProblemType
from megabatch.rl.rounds import Rolled
from megabatch.trainer.evaluation.classification import of_classifier
from megabatch.trainer.evaluation.ranking import of_embeddings, of_reranker
from megabatch.trainer.objectives.classification import MOST_CLASSES, Classification
from megabatch.trainer.objectives.dpo import Dpo as DpoObjective
from megabatch.trainer.objectives.gkd import GkdOfTop, GkdSettings
from megabatch.trainer.objectives.reranker import Reranker as RerankerObjective
from megabatch.trainer.objectives.sft import Sft
from megabatch.trainer.rl.evaluation import best_of
from megabatch.trainer.rl.rolling import measured
from megabatch.trainer.tasks.dpo import variant_of


def of(task: str = "sft", **groups: Any) -> EvaluationMetrics:
    found = evaluation_metrics(Recipe(name="r", task=task, **groups))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("regression", 1),
        ("regression", 3),
        ("single_label_classification", 2),
        ("single_label_classification", 3),
        ("single_label_classification", MOST_CLASSES + 1),
        ("multi_label_classification", 2),
    ],
)
def test_classifiers(kind: ProblemType, labels: int) -> None:
    names = {*Classification(problem_type=kind, num_labels=labels).metrics, *of_classifier(kind, labels).of}
    found = of(training=Training(task_type="seq_cls", num_labels=labels, problem_type=kind))
    of_classes = {f"f1_{number}" for number in range(labels)} & names
    assert names - of_classes == {*found.names}
    assert all(name in found for name in of_classes)


def test_a_classifier_without_labels_is_not_judged_by_its_metrics() -> None:
    assert evaluation_metrics(Recipe(name="r", task="sft", training=Training(task_type="seq_cls"))) is None


@pytest.mark.parametrize("loss_type", ["infonce", "cosine_similarity", "contrastive", "online_contrastive"])
def test_embeddings(loss_type: Any) -> None:
    found = of(training=Training(task_type="embedding"), embedding=Embedding(loss_type=loss_type))
    means = {"loss", "cosine", *(("accuracy",) if loss_type == "infonce" else ())}
    assert {*found.names} == means | {*of_embeddings(loss_type).of}


@pytest.mark.parametrize("listwise", [False, True])
@pytest.mark.parametrize("task_type", ["reranker", "generative_reranker"])
def test_rerankers(task_type: Any, listwise: bool) -> None:
    group = Reranker(loss_type="listwise_reranker" if listwise else "pointwise_reranker")
    found = of(training=Training(task_type=task_type), reranker=group)
    means = RerankerObjective(temperature=1.0 if listwise else None).metrics
    assert {*found.names} == {*means, *of_reranker(probable=not listwise).of}


@pytest.mark.parametrize("group", [Dpo(), Dpo(rpo_alpha=0.5), Dpo(loss_type=("sigmoid", "sft"))])
def test_dpo(group: Dpo) -> None:
    found = of("rlhf", rlhf=Rlhf(rlhf_type="dpo"), dpo=group)
    assert {*found.names} == {*DpoObjective(variant_of(group)).metrics}


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_gkd(alpha: float) -> None:
    settings = GkdSettings(beta=0.5, temperature=1.0, sft_alpha=alpha)
    found = of("rlhf", rlhf=Rlhf(rlhf_type="gkd"), gkd=Gkd(sft_alpha=alpha))
    assert {*found.names} == {*GkdOfTop(settings, None, topk=2).metrics}  # type: ignore[arg-type]  # it asks no teacher


def test_channels_and_dynamic_losses() -> None:
    found = of(training=Training(enable_dft_loss=True, enable_channel_loss=True))
    names = Sft(dynamic=True, channels=["maths", "code"]).metrics
    assert all(name in found for name in names) and {*found.names} == {"loss", "nll", "perplexity"}
    assert "loss_maths" not in of() and "nll" not in of()


@pytest.mark.parametrize("each", [1, 4])
def test_grpo(each: int) -> None:
    names = ("accuracy", "right")
    completions = [
        Rolled(
            key=f"0/0/{number}",
            place="",
            prompt=np.zeros(1, np.int32),
            ids=np.zeros(1, np.int32),
            versions=np.zeros(1, np.int32),
            finish="stop",
            rewards=(1.0, 0.5),
        )
        for number in range(each)
    ]
    made = measured(completions, names, [1.0, 1.0], each=each, trained=0).keys() - {"advantage"}
    made = {name for name in made if not name.startswith("staleness")}
    made |= best_of(completions, names, each=each).keys() if each > 1 else set()
    found = of("rlhf", rlhf=Rlhf(rlhf_type="grpo"), grpo=Grpo(num_generations=4, num_generations_eval=each))
    assert all(name in found for name in made) and {*found.names} <= made
    assert "loss" not in found and ("pass_at_4" in found) == (each > 1)
