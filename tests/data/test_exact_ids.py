"""Token ids against transformers' own `apply_chat_template`, over families of templates and kinds of tokenizers."""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import FAMILIES
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS

from megabatch.data.rows import files
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.formats import Message, conversation_of
from megabatch.data.rows.prompts import prompt_of
from megabatch.data.tokens.sample import Encoded
from megabatch.data.tokens.templates import Template
from megabatch.errors import DataError

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds <two> numbers & more.",
                                      "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip


@functools.cache
def tokenizer(kind: str, family: str | None) -> Any:
    made = copy.deepcopy(KINDS[kind]()) if family is None else copy.copy(tokenizer(kind, None))
    if family is not None:
        made.chat_template = FAMILIES[family]
    return made


@functools.cache
def template(kind: str, family: str, **settings: Any) -> Template:
    return Template(tokenizer(kind, family), **settings)


def ours(kind: str, family: str, fields: dict[str, Any], **settings: Any) -> Encoded:
    conversation = conversation_of(Row(Origin("f", 1), fields))
    (encoded,) = template(kind, family, **settings).encode([conversation], places=["f:1"], loss_scale="default")
    return encoded


def theirs(kind: str, family: str, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    made = tokenizer(kind, family).apply_chat_template(messages, tokenize=True, return_dict=True, **variables)
    return list(made["input_ids"])


_TEXT = st.text("ab it is ,.'\n<>|▁äA", min_size=1, max_size=14).filter(lambda t: t.strip() and "<s>" not in t)
_ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(st.integers(-9, 9), _TEXT), max_size=2)


@st.composite
def conversations(draw: st.DrawFn, *, calls: bool, json_arguments: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(_TEXT)})
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(_TEXT)})
        if calls and draw(st.booleans()):
            number += 1
            arguments = draw(_ARGUMENTS)
            call = {"name": "add", "arguments": json.dumps(arguments) if json_arguments else arguments}
            turn = {"id": f"{number:09d}", "type": "function", "function": call}
            messages.append({"role": "assistant", "tool_calls": [turn]})
            if draw(st.booleans()):
                messages[-1]["content"] = draw(_TEXT)
            messages.append({"role": "tool", "content": draw(_TEXT), "tool_call_id": f"{number:09d}", "name": "add"})
        messages.append({"role": "assistant", "content": draw(_TEXT)})
        if draw(st.booleans()) and not calls:
            messages[-1]["content"] = "<think>\n" + draw(_TEXT) + "\n</think>\n\n" + messages[-1]["content"]
    return messages


QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@QUICK
def test_ids_are_transformers(kind: str, family: str, data: st.DataObject) -> None:
    calls = family != "gemma" and data.draw(st.booleans())
    messages = data.draw(conversations(calls=calls, json_arguments=family == "deepseek"))
    tools = TOOLS if calls and family != "deepseek" else None
    encoded = ours(kind, family, {"messages": messages, **({"tools": tools} if tools else {})})
    assert encoded.ids.tolist() == theirs(kind, family, messages, tools=tools)
    assert encoded.weights[0] == 0
    assert 0 < encoded.weights.sum() < len(encoded.ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@QUICK
def test_every_answer_is_learned_and_no_question(family: str, data: st.DataObject) -> None:
    calls = family != "gemma" and data.draw(st.booleans())
    messages = data.draw(conversations(calls=calls, json_arguments=family == "deepseek"))
    for index, message in enumerate(messages):  # texts that can be told apart
        message["content"] = f"{message['role'][:2]}{index}ab" if "content" in message else None
    tools = TOOLS if calls and family != "deepseek" else None
    encoded = ours("byte_level", family, {"messages": messages, **({"tools": tools} if tools else {})})
    learned = tokenizer("byte_level", family).decode(encoded.ids[encoded.weights > 0])
    rest = tokenizer("byte_level", family).decode(encoded.ids[encoded.weights == 0])
    whole = tokenizer("byte_level", family).decode(encoded.ids)
    for index, message in enumerate(messages):
        text = f"{message['role'][:2]}{index}ab"
        if message["content"] and text in whole:  # some templates leave out what is said beside a call
            by_assistant = message["role"] == "assistant"
            assert (text in learned, text in rest) == (by_assistant, not by_assistant)
    ends = {"qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "hermes": "<|im_end|>", "gemma": "<end_of_turn>",
            "llama3.1": "<|eot_id|>", "mistral": "</s>", "deepseek": "</s>"}  # fmt: skip
    assert learned.count(ends[family]) == sum(m["role"] == "assistant" for m in messages)
    assert learned.count('"add"') + learned.count("<|sep|>add") == sum("tool_calls" in m for m in messages)


INJECTED = ["<|im_end|>\n<|im_start|>assistant\n", "</s>", "<s>[INST]", "<|eot_id|>", "<end_of_turn>", "a</s>b"]
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "<|eot_id|>", "<end_of_turn>", "<|User|>")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@QUICK
def test_control_tokens_in_the_data_are_text(kind: str, family: str, data: st.DataObject) -> None:
    """The template's control tokens are there as often as with harmless contents, and the data's never."""
    messages = data.draw(conversations(calls=False, json_arguments=False))
    harmless = ours(kind, family, {"messages": messages})
    injected = data.draw(st.sampled_from(INJECTED if family != "deepseek" else [*INJECTED, "<|User|>"]))
    spoilt = copy.deepcopy(messages)
    for message in spoilt:
        if data.draw(st.booleans()):
            message["content"] = message["content"] + injected + "b"
    encoded = ours(kind, family, {"messages": spoilt})
    for token in CONTROL:
        number = tokenizer(kind, family).convert_tokens_to_ids(token)
        assert np.count_nonzero(encoded.ids == number) == np.count_nonzero(harmless.ids == number), token
    assert np.count_nonzero(encoded.weights) >= np.count_nonzero(harmless.weights) * 0.5
    allowed = ours(kind, family, {"messages": spoilt}, sanitize_control_tokens=False)
    assert allowed.ids.tolist() == theirs(kind, family, spoilt)
    if kind in ("byte_level", "llama3"):  # these lose nothing
        assert tokenizer(kind, family).decode(encoded.ids) == tokenizer(kind, family).decode(allowed.ids)


@given(text=st.text("ab <s>|/im_end\n▁äA", max_size=30))
@pytest.mark.parametrize("kind", KINDS)
@QUICK
def test_a_text_without_control_tokens_has_the_same_ids_by_the_twin(kind: str, text: str) -> None:
    made = template(kind, "qwen2.5")
    control = made._control
    assert control is not None
    assume(not control.are_in(text))
    plain = tokenizer(kind, None)(text)["input_ids"]
    assert control.twin.encode(control.spelled(text).text).ids == plain


THOUGHTFUL = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "four", "reasoning_content": "add them"},
]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_beside_the_content_are_learned(name: str) -> None:
    messages = [THOUGHTFUL[0], {"role": "assistant", "content": "four", name: "add them"}]
    encoded = ours("byte_level", "qwen3", {"messages": messages})
    assert encoded.ids.tolist() == theirs("byte_level", "qwen3", THOUGHTFUL)
    learned = tokenizer("byte_level", "qwen3").decode(encoded.ids[encoded.weights > 0])
    assert learned == "<think>\nadd them\n</think>\n\nfour<|im_end|>"


@pytest.mark.parametrize("family", ["qwen2.5", "llama3.1", "mistral"])
def test_what_a_template_does_not_read_is_refused_by_name(family: str) -> None:
    with pytest.raises(DataError, match=r"^f:1: .* has reasoning_content, .*; set data\.template to chatml or plain"):
        ours("byte_level", family, {"messages": THOUGHTFUL})
    with pytest.raises(DataError, match=r"^f:1: .* the row has images, which a text model does not read"):
        ours("byte_level", family, {"query": "Q", "response": "A", "images": ["a.png"]})


def test_tools_that_a_template_does_not_read_are_refused() -> None:
    with pytest.raises(DataError, match=r"^f:1: .*the row has tools .* not read them; set data\.template to chatml"):
        ours("byte_level", "gemma", {"query": "Q", "response": "A", "tools": TOOLS})


def test_columns_become_variables_of_the_template() -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    encoded = ours("byte_level", "llama3.1", {"messages": said, "date_string": "1 May 2026"})
    assert encoded.ids.tolist() == theirs("byte_level", "llama3.1", said, date_string="1 May 2026")
    again = ours("byte_level", "llama3.1", {"messages": said, "chat_template_kwargs": {"date_string": "1 May 2026"}})
    assert again.ids.tolist() == encoded.ids.tolist()


def test_a_run_gives_its_templates_variables_and_rows_may_give_others() -> None:
    asked = [{"role": "user", "content": "Q"}]
    of_the_run = Template(tokenizer("byte_level", "qwen3"), variables={"enable_thinking": False})
    for own, thinks in (({}, False), ({"chat_template_kwargs": {"enable_thinking": True}}, True)):
        conversation = prompt_of(
            Row(Origin("f", 1), {"messages": asked, **own}), columns=None, system=None
        ).conversation
        (prompt,) = of_the_run.encode_prompts([conversation], places=["f:1"])
        expected = theirs("byte_level", "qwen3", asked, add_generation_prompt=True, enable_thinking=thinks)
        assert prompt.ids.tolist() == expected
        turns = [*conversation.messages, Message("assistant", "A"), *conversation.messages]
        later = of_the_run.up_to_the_answer(replace(conversation, messages=turns))
        assert later.endswith("<|im_start|>assistant\n" + ("" if thinks else "<think>\n\n</think>\n\n"))


def test_variables_that_the_template_does_not_read_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"gives chat templates enable_thinkin, which chat template .* does not read; try enable_think"
    ):
        Template(tokenizer("byte_level", "qwen3"), variables={"enable_thinkin": False})
    with pytest.raises(
        DataError, match="gives chat templates enable_thinking, which chat template chatml does not read; leave it"
    ):
        Template(tokenizer("byte_level", "qwen3"), name="chatml", variables={"enable_thinking": False})


AGENT = [
    {"role": "user", "content": "Q"},
    {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
    {"role": "tool_response", "content": "R"},
    {"role": "assistant", "content": "A"},
]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma"])
def test_ms_swifts_agent_rows_are_the_templates_own_calls(family: str) -> None:
    arguments: Any = '{"a": 1}' if family == "deepseek" else {"a": 1}
    call = {"id": "000000000", "type": "function", "function": {"name": "add", "arguments": arguments}}
    expected = [
        AGENT[0], {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "R", "tool_call_id": "000000000", "name": "add"}, AGENT[3],
    ]  # fmt: skip
    tools = None if family == "deepseek" else TOOLS
    encoded = ours("byte_level", family, {"messages": AGENT, **({"tools": json.dumps(tools)} if tools else {})})
    assert encoded.ids.tolist() == theirs("byte_level", family, expected, tools=tools)
    learned = tokenizer("byte_level", family).decode(encoded.ids[encoded.weights > 0])
    assert "add" in learned
    assert "R" not in learned


@pytest.mark.parametrize("family", FAMILIES)
def test_consecutive_turns_of_one_role(family: str) -> None:
    """As the template writes them; as one turn, as ms-swift joins them, where it refuses."""
    texts = ["Q1 ", "Q2", "A1 ", "A2", "Q3", "A3"]
    said = [("user" if text[0] == "Q" else "assistant", text) for text in texts]
    messages = [{"role": role, "content": content} for role, content in said]
    try:
        expected = theirs("byte_level", family, messages)
    except Exception:
        merged = [("user", "Q1 Q2"), ("assistant", "A1 A2"), *said[4:]]
        expected = theirs("byte_level", family, [{"role": role, "content": content} for role, content in merged])
    encoded = ours("byte_level", family, {"messages": messages})
    assert encoded.ids.tolist() == expected
    learned = tokenizer("byte_level", family).decode(encoded.ids[encoded.weights > 0])
    assert all(answer in learned for answer in ("A1", "A2", "A3"))
    assert "Q" not in learned


@pytest.mark.parametrize("family", FAMILIES)
def test_text_parts(family: str) -> None:
    """A template that reads parts gets them, as transformers gives them; the others get the joined text."""
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": "b "}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    joined = [{"role": message["role"], "content": " a b "} for message in messages]
    expected = theirs("byte_level", family, messages if family == "gemma" else joined)
    assert ours("byte_level", family, {"messages": messages}).ids.tolist() == expected


def test_arguments_as_json_text_are_not_quoted_twice() -> None:
    for family in ("qwen2.5", "llama3.1", "hermes", "mistral"):
        texts = []
        for arguments in ({"a": 1}, '{"a": 1}'):
            call = {"id": "1" * 9, "type": "function", "function": {"name": "add", "arguments": arguments}}
            messages = [AGENT[0], {"role": "assistant", "tool_calls": [call]}]
            texts.append(ours("byte_level", family, {"messages": messages}).ids.tolist())
        assert texts[0] == texts[1]


def test_null_keys_of_a_parquet_struct_are_absent(tmp_path: Path) -> None:
    """A column of structs gives every message, tool and call the keys of all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "R"},
        {"from": "gpt", "value": "A", "loss": 1.0},
    ]
    other = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "T",
             "tool_calls": [{"id": "x", "function": {"name": "find", "arguments": {"b": "c"}}}]}]  # fmt: skip
    rows = [{"messages": messages, "tools": TOOLS, "images": None}, {"messages": other, "tools": None, "images": [""]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (first, second) = files.rows(tmp_path / "rows.parquet")
    assert first.fields["messages"][0] == messages[0]
    expected = [*messages[:3], {"role": "assistant", "content": "A"}]
    for family in ("qwen3", "llama3.1"):
        encoded = ours("byte_level", family, first.fields)
        assert encoded.ids.tolist() == theirs("byte_level", family, expected, tools=TOOLS)
    read = {"messages": second.fields["messages"]}
    assert ours("byte_level", "qwen3", read).ids.tolist() == theirs("byte_level", "qwen3", other)


def test_what_nothing_reads_is_counted(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Q", "mood": "odd"}, {"role": "assistant", "content": "A </s> B"}]
    row = Row(Origin("f", 1), {"messages": said, "hint": "x", "id": 3, "query": None, "empty": ""})
    remarks: Counter[str] = Counter()
    template("byte_level", "qwen2.5").encode(
        [conversation_of(row)] * 2, places=["f:1", "f:1"], loss_scale="default", remarks=remarks
    )
    assert sorted((+remarks).values()) == [2, 2, 2]
    text = "\n".join(+remarks)
    assert "nothing reads the column 'hint'" in text
    assert "nothing reads the messages' field 'mood'" in text
    assert "control tokens in the text" in text


def test_a_control_token_in_two_halves_is_text_too() -> None:
    """Gemma's template writes the parts of a content side by side."""
    halves = [
        {"type": "text", "text": "a<end_of"},
        {"type": "text", "text": "_turn>b<"},
        {"type": "text", "text": "s>"},
    ]
    messages = [{"role": "user", "content": halves}, {"role": "assistant", "content": "A"}]
    encoded = ours("byte_level", "gemma", {"messages": messages})
    made = tokenizer("byte_level", "gemma")
    assert made.decode(encoded.ids) == made.apply_chat_template(messages, tokenize=False)
    assert (encoded.ids == made.convert_tokens_to_ids("<end_of_turn>")).sum() == 2
    assert (encoded.ids == made.convert_tokens_to_ids("<s>")).sum() == 1
