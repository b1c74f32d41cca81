"""Reward models: Hugging Face classifiers of sequences or tokens, each loaded in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from megabatch.config.rewards import StepAggregation
from megabatch.errors import ConfigError
from megabatch.rewards.own import load_function
from megabatch.rewards.process import WRONG_AND_RIGHT, StepTokens, aggregated, separator_of
from megabatch.rewards.sample import Place, RewardSample, Score
from megabatch.values import dataclass

Device = Literal["auto", "cpu", "cuda"]
_TOKENS = "ForTokenClassification"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModel:
    """The first output of the classifier for prompt and completion, or what a plugin makes of its outputs.

    Of a process reward model, the outputs are the probabilities that the completion's steps are right, and the reward
    is their aggregate.
    """

    path: str
    """A folder or a hub model."""
    plugin: str | None
    """`file.py:function`, called like a user's reward with `outputs` besides: the row of outputs of each sample."""
    device: Device
    aggregation: StepAggregation = "min"
    """Of the steps of a process reward model."""
    step_separator: str | None = None
    """Between them; None: what config.json of the model says."""
    at_a_time: int = 8
    """Completions of a forward pass."""
    place: ClassVar[Place] = "alone"

    @property
    def name(self) -> str:
        return Path(self.path).name

    def open(self) -> Score:
        """Raises: ConfigError for a model that cannot be loaded, or whose tokenizer has no chat template."""
        plugin = None if self.plugin is None else load_function(self.plugin, needed="outputs")
        model = _opened(self)

        def score(samples: Sequence[RewardSample]) -> Sequence[Any]:
            outputs = model.outputs(samples)
            return model.rewards(outputs) if plugin is None else plugin(samples, outputs=outputs)

        return score


class _Loaded:
    """A model in evaluation mode with its tokenizer. Imports torch and transformers."""

    def __init__(self, settings: RewardModel, kind: Any) -> None:
        """Args: kind: transformers' auto class."""
        import torch
        from transformers import AutoTokenizer

        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(settings.path)
            model = kind.from_pretrained(settings.path, dtype="auto")
        except (OSError, ValueError) as error:
            raise ConfigError(f"reward_model={settings.path} cannot be loaded: {error}") from error
        if not self.tokenizer.chat_template:
            raise ConfigError(f"reward_model={settings.path}: its tokenizer has no chat template")
        self.model = model.to(device).eval()
        self._device, self._at_a_time = device, settings.at_a_time
        if self.tokenizer.pad_token_id is None:
            self._at_a_time = 1
        else:
            self.tokenizer.padding_side = "right"
            model.config.pad_token_id = self.tokenizer.pad_token_id

    def logits(self, ids: Sequence[Sequence[int]]) -> Iterator[Any]:
        """fp32, of each sequence: its scores, or those of its tokens and of its padding behind them."""
        import torch

        with torch.inference_mode():
            for first in range(0, len(ids), self._at_a_time):
                part = self.tokenizer.pad(
                    {"input_ids": [list(one) for one in ids[first : first + self._at_a_time]]},
                    padding=self._at_a_time > 1,
                    return_tensors="pt",
                ).to(self._device)
                found = self.model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
                yield from found.float()


class _Classifier:
    """One row of outputs for the whole conversation."""

    def __init__(self, settings: RewardModel) -> None:
        from transformers import AutoModelForSequenceClassification

        self._loaded = _Loaded(settings, AutoModelForSequenceClassification)

    def outputs(self, samples: Sequence[RewardSample]) -> list[list[float]]:
        """[sample][label]."""
        return [row.tolist() for row in self._loaded.logits([self._ids(sample) for sample in samples])]

    def rewards(self, outputs: Sequence[Sequence[float]]) -> list[float]:
        return [row[0] for row in outputs]

    def _ids(self, sample: RewardSample) -> list[int]:
        tokenizer = self._loaded.tokenizer
        messages = [*map(dict, sample.prompt), {"role": "assistant", "content": sample.completion}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, **sample.for_templates)
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


class _Process:
    """A probability for each step of the completion."""

    def __init__(self, settings: RewardModel) -> None:
        """Raises: ConfigError also without a separator, or with other outputs than wrong and right."""
        from transformers import AutoModelForTokenClassification

        self._loaded, self._aggregation = _Loaded(settings, AutoModelForTokenClassification), settings.aggregation
        config = self._loaded.model.config
        if config.num_labels != WRONG_AND_RIGHT:
            raise ConfigError(
                f"reward_model={settings.path} has {config.num_labels} outputs for a token, and a process reward "
                f"model has {WRONG_AND_RIGHT}: wrong and right"
            )
        self._steps = StepTokens(self._loaded.tokenizer, separator_of(config, settings.step_separator, settings.path))

    def outputs(self, samples: Sequence[RewardSample]) -> list[list[float]]:
        """[sample][step]."""
        encoded = [self._steps.encode(sample) for sample in samples]
        scored = zip(encoded, self._loaded.logits([ids for ids, _ in encoded]), strict=True)
        return [logits_T2[ends].softmax(-1)[:, 1].tolist() for (_, ends), logits_T2 in scored]

    def rewards(self, outputs: Sequence[Sequence[float]]) -> list[float]:
        return [aggregated(chances, self._aggregation) for chances in outputs]


def _opened(settings: RewardModel) -> _Classifier | _Process:
    """The model by the class that its config.json names."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward_model={settings.path} cannot be loaded: {error}") from error
    scores_tokens = any(str(name).endswith(_TOKENS) for name in config.architectures or ())
    return _Process(settings) if scores_tokens else _Classifier(settings)
