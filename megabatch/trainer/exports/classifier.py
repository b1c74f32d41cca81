"""What transformers' `…ForSequenceClassification` and `…ForTokenClassification` read in config.json besides what the
language model's has."""

from __future__ import annotations

from typing import Any

from megabatch.config.heads import problem_type
from megabatch.config.run import RunConfig
from megabatch.trainer.exports.padding import padding_of
from megabatch.trainer.model_source import ModelSource

_KEPT = ("id2label", "label2id")


def classifier_config(run: RunConfig, source: ModelSource, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the trained classifier, from that of the model that it started from.

    `id2label` gives the number of labels; names that the model had for them are kept. transformers finds the last
    token of a batch's texts by `pad_token_id`. `step_separator` is for those who score an answer's steps.
    """
    labels, padding = run.shape.num_labels or 0, padding_of(run, source)
    names = config.get("id2label")
    if not isinstance(names, dict) or len(names) != labels:
        names = {str(index): f"LABEL_{index}" for index in range(labels)}
    changed = {
        "architectures": [run.shape.architecture],
        "id2label": names,
        "label2id": {name: int(index) for index, name in names.items()},
        **_kind(run),
        "pad_token_id": config.get("pad_token_id") if padding is None else padding.number,
    }
    return {key: value for key, value in config.items() if key not in ("num_labels", *_KEPT)} | changed


def _kind(run: RunConfig) -> dict[str, Any]:
    if run.task.rows == "steps":
        return {"step_separator": run.recipe.prm.step_separator}
    return {"problem_type": problem_type(run.recipe)}
