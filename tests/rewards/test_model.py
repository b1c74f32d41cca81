"""Reward models: a tiny classifier in a process of its own, against transformers called directly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.prompts import prompt_of
from megabatch.data.rows.turns import as_mapping
from megabatch.errors import ConfigError
from megabatch.rewards.model import RewardModel
from megabatch.rewards.rewards import Rewards
from megabatch.rewards.sample import RewardSample

WORDS = ["[pad]", "[unk]", "user", "assistant", ":", "two", "three", "four", "is", "it", "what", "then"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with two outputs."""
    return saved(tmp_path_factory.mktemp("models") / "tiny-rm", "SequenceClassification")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A process reward model."""
    return saved(tmp_path_factory.mktemp("models") / "tiny-prm", "TokenClassification", step_separator="then")


def saved(path: Path, kind: str, **settings: Any) -> Path:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[pad]", unk_token="[unk]")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_labels=2, pad_token_id=0, **settings,
    )  # fmt: skip
    getattr(transformers, f"LlamaFor{kind}")(config).save_pretrained(path)
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


READS_ROWS = (
    "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}{{ mood or '' }} "
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} "
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_models_read_what_a_row_has_for_its_template(kind: str, tmp_path: Path) -> None:
    """As transformers renders the row; each of tools, variables and calls changes the score."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    folder = saved(tmp_path / "reads", kind, step_separator="then")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = READS_ROWS
    tokenizer.save_pretrained(folder)
    call = {"type": "function", "function": {"name": "three", "arguments": {}}}
    messages = [
        {"role": "user", "content": "what is it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "four"},
    ]
    own = {"tools": [{"type": "function", "function": {"name": "three"}}], "chat_template_kwargs": {"mood": "four"}}
    rows = [
        {"messages": messages, **own},
        {"messages": messages},
        {"messages": messages, "tools": own["tools"]},
        {"messages": [messages[0], {"role": "assistant", "content": "it"}, messages[2]], **own},
    ]
    given, expected = [], []
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    for number, row in enumerate(rows):
        asked = prompt_of(Row(Origin("f", number), row))
        turns = [as_mapping(one) for one in asked.conversation.messages]
        given.append(
            RewardSample(key=f"0/0/{number}", prompt=turns, completion="two then", ids=(), columns=asked.for_rewards)
        )
        text = tokenizer.apply_chat_template(
            [*row["messages"], {"role": "assistant", "content": "two then"}],
            tools=row.get("tools"), tokenize=False, **row.get("chat_template_kwargs", {}),
        )  # fmt: skip
        with torch.inference_mode():
            logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0]
        expected.append(logits[0].item() if kind.startswith("Seq") else logits[-1].softmax(-1)[1].item())
    found = RewardModel(path=str(folder), plugin=None, device="cpu").open()(given)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == len(rows)


def test_a_model_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"reward_model={tmp_path} cannot be loaded"):
        RewardModel(path=str(tmp_path), plugin=None, device="cpu").open()


ANSWERS = ("two is it then three then four", "four then", " then it", "")
"""In three steps, one step twice, and none."""


def of_steps(folder: Path) -> list[list[float]]:
    """Of each step of the answers, by transformers directly, without padding."""
    import torch
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    found = []
    for text in ANSWERS:
        words, ends = ["user", ":", "what", "is", "it", "assistant", ":"], []
        for step in filter(str.strip, text.split("then")):
            words += [*step.split(), "then"]
            ends.append(len(words) - 1)
        with torch.inference_mode():
            logits = model(torch.tensor([[WORDS.index(word) for word in words]])).logits[0]
        found.append(logits.softmax(-1)[ends, 1].tolist())
    return found


@pytest.mark.parametrize(
    ("how", "of"),
    [("min", min), ("product", math.prod), ("last", lambda one: one[-1]), ("mean", lambda one: sum(one) / len(one))],
)
def test_process_rewards_are_the_aggregated_chances_of_steps(
    how: Any, of: Callable[[Sequence[float]], float], process: Path
) -> None:
    given = [
        RewardSample(key=f"0/0/{i}", prompt=samples()[0].prompt, completion=text, ids=())
        for i, text in enumerate(ANSWERS)
    ]
    model = RewardModel(path=str(process), plugin=None, device="cpu", aggregation=how, at_a_time=3)
    expected = [of(chances) if chances else 0.0 for chances in of_steps(process)]
    assert [len(chances) for chances in of_steps(process)] == [3, 1, 1, 0]
    assert model.open()(given) == pytest.approx(expected, abs=1e-5)


def test_a_process_reward_model_needs_a_separator_and_two_outputs(tmp_path: Path) -> None:
    bare = saved(tmp_path / "bare", "TokenClassification")
    with pytest.raises(ConfigError, match=r"config.json has no step_separator; set rewards.reward_step_separator"):
        RewardModel(path=str(bare), plugin=None, device="cpu").open()
    config = (bare / "config.json").read_text()
    RewardModel(path=str(bare), plugin=None, device="cpu", step_separator="then").open()
    import json

    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(bare / "model.safetensors")
    tensors |= {"score.weight": torch.zeros(3, 16), "score.bias": torch.zeros(3)}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    (bare / "config.json").write_text(json.dumps({**json.loads(config), "id2label": {0: "a", 1: "b", 2: "c"}}))
    with pytest.raises(ConfigError, match="has 3 outputs for a token, and a process reward model has 2"):
        RewardModel(path=str(bare), plugin=None, device="cpu", step_separator="then").open()
