"""Reward models: a tiny classifier in a process of its own, against transformers called directly."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabatch.errors import ConfigError
from megabatch.rewards.model import RewardModel
from megabatch.rewards.rewards import Rewards
from megabatch.rewards.sample import RewardSample

WORDS = ["[pad]", "[unk]", "user", "assistant", ":", "two", "three", "four", "is", "it", "what"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with two outputs."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny-rm"
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[pad]", unk_token="[unk]")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(path)
    return path


def samples() -> list[RewardSample]:
    prompt = [{"role": "user", "content": "what is it"}]
    texts = ["two", "it is three four", "four"]
    return [RewardSample(key=f"0/0/{i}", prompt=prompt, completion=text, ids=()) for i, text in enumerate(texts)]


def directly(folder: Path) -> list[list[float]]:
    """Each text alone, without padding."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for one in samples():
        words = ["user", ":", "what", "is", "it", "assistant", ":", *one.completion.split()]
        with torch.inference_mode():
            found.append(model(torch.tensor([[WORDS.index(word) for word in words]])).logits[0].tolist())
    return found


def test_scores_are_the_classifiers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text(
        "def difference(outputs, completions, **columns):\n    return [row[1] - row[0] for row in outputs]\n"
    )
    plain = RewardModel(path=str(folder), plugin=None, device="cpu", at_a_time=2)
    plugged = RewardModel(path=str(folder), plugin=f"{tmp_path}/plug.py:difference", device="cpu")
    expected = directly(folder)
    assert plain.open()(samples()) == pytest.approx([row[0] for row in expected], abs=1e-5)
    with Rewards([plugged], weights=None, workers=1, timeout_s=120) as rewards:
        found = rewards.of(samples())
    assert found.names == ("tiny-rm",)
    assert [row[0] for row in found.values] == pytest.approx([row[1] - row[0] for row in expected], abs=1e-5)


def test_a_model_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"reward_model={tmp_path} cannot be loaded"):
        RewardModel(path=str(tmp_path), plugin=None, device="cpu").open()
