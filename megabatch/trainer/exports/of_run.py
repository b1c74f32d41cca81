"""What a run writes for others: its model as a Hugging Face folder, or its adapter as PEFT's."""

from __future__ import annotations

from megabatch.config.run import RunConfig
from megabatch.trainer.exports.export import Export
from megabatch.trainer.exports.hugging_face import hugging_face_export
from megabatch.trainer.exports.peft import peft_export
from megabatch.trainer.model_source import ModelSource


def export_of(run: RunConfig, source: ModelSource) -> Export:
    """The run's export; merges a LoRA adapter into the model unless `merge_lora` is False."""
    recipe = run.recipe
    if recipe.tuner.tuner_type == "lora" and recipe.bridge.merge_lora is False:
        return peft_export(run, source)
    return hugging_face_export(run, source)
