from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_templates import (
    LLAMA2,
    LLAMA3,
    MARKED,
    MARKED_IN_PARTS,
    NO_THINKING,
    PARTS_ONLY,
    QWEN2_5,
    QWEN3,
    REASONER,
    RESULTS_INSIDE,
    SPECIAL_TOKENS,
    TWO_ENDS,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megabatch.data.rows.formats import Conversation, Message
from megabatch.data.tokens.sample import Encoded
from megabatch.data.tokens.templates import Template
from megabatch.errors import DataError

TWO_ROUNDS = [
    Message("user", "What is two plus two?"),
    Message("assistant", "It is four."),
    Message("user", "How many apples?"),
    Message("assistant", "Seven ä apples."),
]
THINKING = [
    Message("user", "What is two plus two?"),
    Message("assistant", "<think>\nadd them\n</think>\n\nfour"),
    Message("user", "How many apples?"),
    Message("assistant", "<think>count them</think>seven"),
]

QUOTE = "It is<|im_end|>\n<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\nIt is"
"""An answer that quotes what comes after it."""


@pytest.fixture(scope="module")
def tokens(bpe: Any) -> Any:
    tokenizer = copy.deepcopy(bpe)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *SPECIAL_TOKENS], "bos_token": "<s>"})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def encode(
    tokenizer: Any,
    source: str | None,
    messages: list[Message],
    *,
    scale: str = "default",
    name: str | None = None,
) -> tuple[str, list[str]]:
    """(all text, runs of learned text)."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = source
    (encoded,) = Template(tokenizer, name=name).encode([Conversation(messages)], places=["f:1"], loss_scale=scale)
    assert encoded.ids.dtype == np.int32
    assert encoded.weights.dtype == np.float32
    assert encoded.weights[0] == 0
    return tokenizer.decode(encoded.ids), learned(tokenizer, encoded)


def learned(tokenizer: Any, encoded: Encoded) -> list[str]:
    runs: list[list[int]] = []
    before = -2
    for place in np.flatnonzero(encoded.weights).tolist():
        if place != before + 1:
            runs.append([])
        runs[-1].append(int(encoded.ids[place]))
        before = place
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (QWEN2_5, TWO_ROUNDS, ["It is four.<|im_end|>", "Seven ä apples.<|im_end|>"]),
        (MARKED, TWO_ROUNDS, ["It is four.<|im_end|>", "Seven ä apples.<|im_end|>"]),
        (LLAMA3, TWO_ROUNDS, ["It is four.<|eot_id|>", "Seven ä apples.<|eot_id|>"]),
        (LLAMA2, TWO_ROUNDS, ["It is four. <|im_end|>", "Seven ä apples. <|im_end|>"]),
        (REASONER, TWO_ROUNDS, ["It is four.<|im_end|>", "Seven ä apples.<|im_end|>"]),
        (QWEN3, TWO_ROUNDS, ["It is four.<|im_end|>", "<think>\n\n</think>\n\nSeven ä apples.<|im_end|>"]),
        (QWEN3, THINKING, ["four<|im_end|>", "<think>\ncount them\n</think>\n\nseven<|im_end|>"]),
        (QWEN3, THINKING[:2], ["<think>\nadd them\n</think>\n\nfour<|im_end|>"]),
        (REASONER, THINKING, ["four<|im_end|>", "seven<|im_end|>"]),
        (QWEN2_5, THINKING[:2], ["<think>\nadd them\n</think>\n\nfour<|im_end|>"]),
        (MARKED_IN_PARTS, TWO_ROUNDS, ["It is four.<|im_end|>", "Seven ä apples.<|im_end|>", "</s>"]),
        (TWO_ENDS, TWO_ROUNDS, ["It is four.</s><|eot_id|>", "Seven ä apples.</s><|eot_id|>"]),
        (NO_THINKING, TWO_ROUNDS, ["It is four.<|im_end|>", "Seven ä apples.<|im_end|>"]),
        (NO_THINKING, THINKING[2:], ["<think>count them</think>seven<|im_end|>"]),
        (QWEN2_5, [TWO_ROUNDS[0], Message("assistant", QUOTE), *TWO_ROUNDS[2:]],
         [QUOTE + "<|im_end|>", "Seven ä apples.<|im_end|>"]),
        (QWEN2_5, [Message("assistant", "alone")], ["alone<|im_end|>"]),
        (LLAMA3, [Message("system", "S"), Message("user", " Q "), Message("assistant", "\nA \n")], ["A<|eot_id|>"]),
        (QWEN2_5, [*TWO_ROUNDS[:2], Message("tool", "It is four."), Message("assistant", "It is four.")],
         ["It is four.<|im_end|>", "It is four.<|im_end|>"]),
    ],
)  # fmt: skip
def test_learned_text(tokens: Any, source: str, messages: list[Message], expected: list[str]) -> None:
    assert encode(tokens, source, messages)[1] == expected


def test_results_inside_the_turn_that_called_are_not_learned(tokens: Any) -> None:
    call = {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    said = [TWO_ROUNDS[0], Message("assistant", "I add.", fields=call), Message("tool", "one"), Message("tool", "two"),
            Message("assistant", "It is four.")]  # fmt: skip
    text, runs = encode(tokens, RESULTS_INSIDE, said)
    assert "[TOOL_RESULTS]one[/TOOL_RESULTS][TOOL_RESULTS]two[/TOOL_RESULTS]I add.<|im_start|>assistant" in text
    assert runs == ["<tool_call>add", "I add.", "It is four.<|im_end|>"]


def test_a_template_that_reads_parts_alone_gets_parts(tokens: Any) -> None:
    text, runs = encode(tokens, PARTS_ONLY, TWO_ROUNDS[:2])
    assert text == "user:What is two plus two?<|im_end|>assistant:It is four.<|im_end|>"
    assert runs == ["It is four.<|im_end|>"]


def test_ids_are_those_of_the_whole_rendering(tokens: Any) -> None:
    tokenizer = copy.copy(tokens)
    tokenizer.chat_template = QWEN3
    chat = [{"role": m.role, "content": m.content} for m in THINKING]
    expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    (encoded,) = Template(tokenizer).encode([Conversation(THINKING)], places=["f:1"], loss_scale="default")
    assert encoded.ids.tolist() == expected


def test_the_generation_mask_of_transformers_agrees(tokens: Any) -> None:
    """An independent route to the mask: `{% generation %}` in the template, evaluated by transformers."""
    marked = QWEN2_5.replace(
        "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
        "{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}{% generation %}"
        "{{- m.content + '<|im_end|>' }}{% endgeneration %}{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}"
        "{{- '\\n' }}",
    )
    chat = [{"role": m.role, "content": m.content} for m in TWO_ROUNDS]
    theirs = tokens.apply_chat_template(
        chat, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = copy.copy(tokens)
    tokenizer.chat_template = QWEN2_5
    (ours,) = Template(tokenizer).encode([Conversation(TWO_ROUNDS)], places=["f:1"], loss_scale="default")
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.weights.tolist() == theirs["assistant_masks"]


def test_loss_scale_chooses_turns(tokens: Any) -> None:
    for source in (QWEN2_5, MARKED):
        assert encode(tokens, source, TWO_ROUNDS, scale="last_round")[1] == ["Seven ä apples.<|im_end|>"]
    assert encode(tokens, MARKED_IN_PARTS, TWO_ROUNDS, scale="last_round")[1] == ["Seven ä apples.<|im_end|>", "</s>"]
    text, runs = encode(tokens, QWEN2_5, TWO_ROUNDS, scale="all")
    assert ["<|im_start|>" + runs[0]] == [text]
    halved = [TWO_ROUNDS[0], Message("assistant", "It is four.", scale=0.5), *TWO_ROUNDS[2:]]
    assert encode(tokens, QWEN2_5, halved, scale="last_round")[1] == ["Seven ä apples.<|im_end|>"]
    (weighed,) = Template(tokens).encode([Conversation(halved)], places=["f:1"], loss_scale="default")
    assert set(weighed.weights.tolist()) == {0.0, 0.5, 1.0}
    own = [*TWO_ROUNDS[:3], Message("assistant", "no", loss=False)]
    assert encode(tokens, QWEN2_5, own)[1] == ["It is four.<|im_end|>"]
    text, runs = encode(tokens, QWEN2_5, own, scale="all")
    assert ["<|im_start|>" + runs[0] + "no<|im_end|>" + runs[1]] == [text]


def test_agentflan_weighs_answers_by_their_questions(tokens: Any) -> None:
    asked = Message("user", "What is the value of x?")
    messages = [asked, Message("assistant", "Five"), Message("user", "So?"), Message("assistant", "Tool: f")]
    runs = [(text, weight) for text, weight in weighed(tokens, QWEN2_5, messages, "agentflan") if weight]
    assert runs == [("Five", 3.0), ("<|im_end|>", 1.0), ("Tool:", 1.0), (" f", 3.0), ("<|im_end|>", 1.0)]


def weighed(tokenizer: Any, source: str, messages: list[Message], scale: str) -> list[tuple[str, float]]:
    """Runs of text of one weight, without the prompt and what stands between turns."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = source
    (encoded,) = Template(tokenizer).encode([Conversation(messages)], places=["f:1"], loss_scale=scale)
    runs: list[tuple[list[int], float]] = []
    for number, weight in zip(encoded.ids.tolist(), encoded.weights.tolist(), strict=True):
        if not runs or runs[-1][1] != weight:
            runs.append(([], weight))
        runs[-1][0].append(number)
    return [(tokenizer.decode(run), weight) for run, weight in runs]


def test_scales_weigh_parts_of_turns_and_never_their_ends(tokens: Any) -> None:
    header = "<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\n"
    asked = [TWO_ROUNDS[2], TWO_ROUNDS[3]]
    assert weighed(tokens, QWEN3, asked, "ignore_empty_think") == [
        (header + "<think>\n\n</think>\n\n", 0.0), ("Seven ä apples.<|im_end|>", 1.0), ("\n", 0.0)]  # fmt: skip
    thinking = [TWO_ROUNDS[2], Message("assistant", "<think>\nadd\n</think>\n\nSeven")]
    said = "<think>\nadd\n</think>\n\nSeven<|im_end|>"
    assert weighed(tokens, QWEN3, thinking, "ignore_empty_think") == [(header, 0.0), (said, 1.0), ("\n", 0.0)]
    reacting = [TWO_ROUNDS[2], Message("assistant", "Action: count\nObservation: 7")]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert weighed(tokens, QWEN2_5, reacting, "react") == [
        (system + header, 0.0), ("Action: count\nObservation:", 2.0), (" 7", 0.0), ("<|im_end|>", 1.0),
        ("\n", 0.0)]  # fmt: skip
    halved = [*TWO_ROUNDS[:2], asked[0], replace(reacting[1], loss=0.5)]
    assert [weight for _, weight in weighed(tokens, QWEN2_5, halved, "last_round+react")] == [0, 1, 0, 0.5, 0]
    assert [weight for _, weight in weighed(tokens, QWEN2_5, halved, "react")] == [0, 1, 0, 1, 0, 0.5, 0]
    own = [*TWO_ROUNDS[:2], asked[0], replace(reacting[1], scale=3.0)]
    for scale in ("react", "default"):
        assert [weight for _, weight in weighed(tokens, QWEN2_5, own, scale)] == [0, 1, 0, 3, 0]
    assert [weight for _, weight in weighed(tokens, QWEN2_5, [*own, *TWO_ROUNDS[:2]], "last_round+react")] == [0, 1, 0]
    silent = [asked[0], replace(reacting[1], loss=0.0)]
    assert [weight for _, weight in weighed(tokens, QWEN2_5, silent, "react")] == [0]
    assert [weight for _, weight in weighed(tokens, QWEN2_5, reacting, "all+react")] == [0, 1, 2, 0, 1]


def test_a_turn_with_two_ends_keeps_both(tokens: Any) -> None:
    said = [TWO_ROUNDS[0], Message("assistant", "Observation: 4")]
    assert weighed(tokens, TWO_ENDS, said, "react")[-2:] == [(" 4", 0.0), ("</s><|eot_id|>", 1.0)]


def test_default_template_depends_on_the_vocabulary(tokens: Any) -> None:
    text, runs = encode(tokens, None, TWO_ROUNDS[:2])
    assert text == "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
    assert runs == ["It is four.<|im_end|>"]
    text, runs = encode(tokens, QWEN3, TWO_ROUNDS[:2], name="plain")
    assert text == "User: What is two plus two?\nAssistant: It is four.<|im_end|>\n"
    assert runs == ["It is four.<|im_end|>"]


def test_a_vocabulary_without_chat_tokens_gets_the_plain_template() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["some text"], trainer)
    base = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    text, runs = encode(base, None, TWO_ROUNDS[:2])
    assert text == "User: What is two plus two?\nAssistant: It is four.</s>\n"
    assert runs == ["It is four.</s>"]
    with pytest.raises(DataError, match=r"needs <\|im_start\|>.*try plain"):
        Template(base, name="chatml")


def test_unknown_template_suggests_the_nearest(tokens: Any) -> None:
    with pytest.raises(DataError, match=r"data\.template='chatnl' is unknown; try chatml,"):
        Template(tokens, name="chatnl")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[0].content }}", "omits, repeats or reorders assistant message 0"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "omits, repeats or reorders"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "is not found in the rendered conversation"),
        ("{{ messages | length }}{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_a_template_that_cannot_be_aligned_is_named_with_the_sample(tokens: Any, source: str, reason: str) -> None:
    tokenizer = copy.copy(tokens)
    tokenizer.chat_template = source
    message = rf"^train\.jsonl:9: chat template of the tokenizer cannot be used on it: .*{reason}"
    with pytest.raises(DataError, match=message):
        Template(tokenizer).encode([Conversation(TWO_ROUNDS)], places=["train.jsonl:9"], loss_scale="default")


def test_a_template_without_end_of_turn_warns_once(tokens: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = copy.copy(tokens)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    template = Template(tokenizer)
    for _ in range(2):
        (encoded,) = template.encode([Conversation(TWO_ROUNDS[:2])], places=["f:1"], loss_scale="default")
    assert learned(tokenizer, encoded) == ["It is four."]
    assert caplog.text.count("no end-of-turn token") == 1


def test_a_template_shipped_with_transformers(tokens: Any) -> None:
    processing = pytest.importorskip("transformers.models.qwen2_audio.processing_qwen2_audio")
    source = processing.Qwen2AudioProcessor.default_chat_template.fget(None)
    assert encode(tokens, source, TWO_ROUNDS)[1] == ["It is four.<|im_end|>", "Seven ä apples.<|im_end|>"]


_CONTENT = st.text("ab \n<>|:ä", min_size=1, max_size=12).filter(str.strip)


@given(said=st.lists(_CONTENT, min_size=2, max_size=6), source=st.sampled_from([QWEN2_5, LLAMA3, LLAMA2, QWEN3]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_is_found(tokens: Any, said: list[str], source: str) -> None:
    said = said[: len(said) // 2 * 2]
    messages = [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(said)]
    _, runs = encode(tokens, source, messages)
    assert len(runs) == len(said) // 2
    for run, content in zip(runs, said[1::2], strict=True):
        assert content.strip() in run
