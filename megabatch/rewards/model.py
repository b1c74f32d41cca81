"""Reward models: Hugging Face sequence classifiers, each loaded in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from megabatch.errors import ConfigError
from megabatch.rewards.own import load_function
from megabatch.rewards.sample import Place, RewardSample, Score

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModel:
    """The first output of the classifier for prompt and completion, or what a plugin makes of its outputs."""

    path: str
    """A folder or a hub model."""
    plugin: str | None
    """`file.py:function`, called like a user's reward with `outputs` besides: the row of outputs of each sample."""
    device: Device
    at_a_time: int = 8
    """Completions of a forward pass."""
    place: ClassVar[Place] = "alone"

    @property
    def name(self) -> str:
        return Path(self.path).name

    def open(self) -> Score:
        """Raises: ConfigError for a model that cannot be loaded, or whose tokenizer has no chat template."""
        plugin = None if self.plugin is None else load_function(self.plugin, needed="outputs")
        classifier = _Classifier(self)

        def score(samples: Sequence[RewardSample]) -> Sequence[Any]:
            outputs = classifier.outputs(samples)
            return _first(outputs) if plugin is None else plugin(samples, outputs=outputs)

        return score


def _first(outputs: Sequence[Sequence[float]]) -> list[float]:
    return [row[0] for row in outputs]


class _Classifier:
    """Imports torch and transformers."""

    def __init__(self, settings: RewardModel) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(settings.path)
            model = AutoModelForSequenceClassification.from_pretrained(settings.path, dtype="auto")
        except (OSError, ValueError) as error:
            raise ConfigError(f"reward_model={settings.path} cannot be loaded: {error}") from error
        if not self._tokenizer.chat_template:
            raise ConfigError(f"reward_model={settings.path}: its tokenizer has no chat template")
        self._model = model.to(device).eval()
        self._device, self._at_a_time = device, settings.at_a_time
        if self._tokenizer.pad_token_id is None:
            self._at_a_time = 1
        else:
            self._tokenizer.padding_side = "right"
            model.config.pad_token_id = self._tokenizer.pad_token_id

    def outputs(self, samples: Sequence[RewardSample]) -> list[list[float]]:
        """[sample][label]."""
        import torch

        texts = [self._text(sample) for sample in samples]
        found: list[list[float]] = []
        with torch.inference_mode():
            for first in range(0, len(texts), self._at_a_time):
                part = self._tokenizer(
                    texts[first : first + self._at_a_time],
                    add_special_tokens=False,
                    padding=self._at_a_time > 1,
                    return_tensors="pt",
                ).to(self._device)
                logits = self._model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
                found += logits.float().tolist()
        return found

    def _text(self, sample: RewardSample) -> str:
        messages = [*map(dict, sample.prompt), {"role": "assistant", "content": sample.completion}]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return text
