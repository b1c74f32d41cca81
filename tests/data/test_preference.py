"""Rows with a good and a bad answer, up to the pairs of samples in a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.preference import is_preference, preference_of
from megabatch.data.rows.sources import resolve
from megabatch.data.tokens.encoder import CUT_ALIKE, Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.pairs import EQUAL
from megabatch.data.tokens.templates import Template
from megabatch.errors import DataError


def row(**fields: Any) -> Row:
    return Row(Origin("pairs.jsonl", 7), fields)


@pytest.fixture(scope="module")
def bpe_template(bpe: Any) -> Template:
    return Template(bpe)


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation of these texts, which the user begins."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


SHAPES: dict[str, dict[str, Any]] = {
    "messages, rejected_response": {"messages": said("Q", "good"), "rejected_response": "bad"},
    "messages, rejected_messages": {"messages": said("Q", "good"), "rejected_messages": said("Q", "bad")},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
        "rejected_response": "bad",
    },
    "query, response": {"query": "Q", "response": "good", "rejected_response": "bad"},
    "alpaca": {"instruction": "Q", "input": "", "output": "good", "rejected_response": "bad"},
    "texts": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "lists": {"prompt": said("Q"), "chosen": answer("good"), "rejected": answer("bad")},
    "implicit prompt": {"chosen": said("Q", "good"), "rejected": said("Q", "bad")},
    "whole conversations with their prompt": {
        "prompt": "Q",
        "chosen": said("Q", "good"),
        "rejected": said("Q", "bad"),
    },
}


def test_numbers_may_be_texts_and_messages_json_as_in_csv() -> None:
    texts = {name: json.dumps(value) for name, value in SHAPES["lists"].items()}
    given = {"margin": "1.5", "ref_chosen_logps": "-1", "ref_rejected_logps": "-2.5"}
    for fields in (texts, texts | {"rejected": " " + texts["rejected"].replace("[{", "[ {")}):
        pair, expected = preference_of(row(**fields, **given)), preference_of(row(**SHAPES["lists"]))
        assert (pair.chosen, pair.rejected) == (expected.chosen, expected.rejected)
        assert (pair.margin, pair.ref_logps) == (1.5, (-1.0, -2.5))
    empty = preference_of(row(**SHAPES["texts"], **dict.fromkeys(given, "")))
    assert (empty.margin, empty.ref_logps) == (0.0, None)


@pytest.mark.parametrize("answers", [('[{"name": "f", "arguments": {}}]', '[{"name": "g"}]'), ("[3]", "[4, 5]")])
def test_an_answer_that_is_json_stays_a_text(answers: tuple[str, str]) -> None:
    pair = preference_of(row(prompt="[1, 2]: which call?", chosen=answers[0], rejected=answers[1]))
    assert (pair.chosen.messages[-1].content, pair.rejected.messages[-1].content) == answers
    assert pair.chosen.messages[0].content == "[1, 2]: which call?"


@pytest.mark.parametrize("shape", SHAPES)
def test_accepted_shapes(shape: str) -> None:
    given = row(**SHAPES[shape], margin=None)
    pair = preference_of(given)
    for conversation, expected in ((pair.chosen, "good"), (pair.rejected, "bad")):
        assert [(m.role, m.content) for m in conversation.messages] == [("user", "Q"), ("assistant", expected)]
        assert not conversation.columns
    assert pair.margin == 0.0
    assert is_preference(given)


def test_turns_before_the_answer_system_and_columns_are_of_both() -> None:
    whole = row(question=said("Q", "A", "Q2", "good"), rejected_response="bad", tools='[{"name": "f"}]', margin=2)
    pair = preference_of(whole, columns={"question": "messages"}, system="S")
    assert [m.content for m in pair.rejected.messages] == ["S", "Q", "A", "Q2", "bad"]
    assert pair.chosen.columns == pair.rejected.columns == {"tools": [{"name": "f"}]}
    assert pair.margin == 2.0
    implicit = preference_of(row(chosen=said("Q", "A", "Q2", "good"), rejected=said("Q", "A", "Q2", "bad")))
    assert [m.loss for m in implicit.chosen.messages] == [None, 0.0, None, None], "a turn of the prompt is not learned"


WHOLE = {
    "last answers": (said("Q", "A", "Q2", "good"), said("Q", "A", "Q2", "bad")),
    "answers in the middle": (said("Q", "good", "Q2", "A"), said("Q", "bad", "Q2", "B")),
    "other courses": (said("Q", "good", "Q2", "A", "Q4", "C"), said("Q", "bad", "Q3", "B")),
    "after a first round": (said("Q", "A", "Q2", "good", "Q3", "C"), said("Q", "A", "Q2", "bad", "Q3", "D")),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("loss_scale", [None, "default"])
def test_the_shared_messages_are_the_prompt_as_in_trl(
    name: str, loss_scale: str | None, bpe_template: Template
) -> None:
    """TRL's `extract_prompt` on the same row: what follows the prompt is learned, the assistant's part of it."""
    from trl.data_utils import extract_prompt

    chosen, rejected = WHOLE[name]
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    pair = preference_of(row(chosen=chosen, rejected=rejected))
    for mine, which in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
        (encoded,) = bpe_template.encode([mine], places=["x"], loss_scale=loss_scale or "last_round")
        learned = bpe_template.tokenizer.decode(encoded.ids[encoded.weights > 0])
        answers = [one["content"] for one in theirs[which] if one["role"] == "assistant"]
        assert learned == "".join(f"{text}<|im_end|>" for text in answers)


@pytest.mark.parametrize("name", WHOLE)
def test_both_forms_of_whole_conversations_learn_the_same_answers(name: str, bpe_template: Template) -> None:
    chosen, rejected = WHOLE[name]
    forms = [{"chosen": chosen, "rejected": rejected}, {"messages": chosen, "rejected_messages": rejected}]
    found = [preference_of(row(**form)) for form in forms]
    for one, other in zip(*((pair.chosen, pair.rejected) for pair in found), strict=True):
        first, second = bpe_template.encode([one, other], places=["x", "y"], loss_scale="last_round")
        assert first.ids.tolist() == second.ids.tolist() and first.weights.tolist() == second.weights.tolist()


def test_a_message_s_own_loss_comes_first() -> None:
    chosen, rejected = said("Q", "good", "Q2", "A"), said("Q", "bad", "Q2", "B")
    chosen[1] |= {"loss": False}  # type: ignore[dict-item]
    pair = preference_of(row(messages=chosen, rejected_messages=rejected))
    assert [m.loss for m in pair.chosen.messages] == [None, 0.0, None, None]
    assert [m.loss for m in pair.rejected.messages] == [None, 1.0, None, None]


def test_turns_in_other_spellings_are_the_same_prompt() -> None:
    spelled = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "bad"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, *answer("bad")]
    for rejected in (spelled, parts):
        pair = preference_of(row(chosen=said("Q", "good"), rejected=rejected))
        assert [m.content for m in pair.rejected.messages] == ["Q", "bad"]


def test_other_conversations_beside_chosen_and_rejected_are_not_read() -> None:
    """As in UltraFeedback's binarized pairs, whose `messages` are the chosen conversation."""
    beside = {"prompt": "Q", "prompt_id": "7", "messages": said("Q", "good"), "score_chosen": 8.0}
    pair = preference_of(row(**beside, chosen=said("Q", "good"), rejected=said("Q", "bad")))
    assert [m.content for m in pair.chosen.messages] == ["Q", "good"]
    assert [m.content for m in pair.rejected.messages] == ["Q", "bad"]
    short = preference_of(row(**beside, chosen="good", rejected="bad"))
    assert [m.content for m in short.rejected.messages] == ["Q", "bad"]
    assert not {"messages", "prompt"} & pair.chosen.columns.keys(), "they say what the pair says"


def test_other_conversations_that_say_something_else_are_columns_that_nothing_reads() -> None:
    beside = {"prompt": "another", "messages": said("Q", "other"), "query": "Q"}
    pair = preference_of(row(**beside, chosen=said("Q", "good"), rejected=said("Q", "bad")))
    for one in (pair.chosen, pair.rejected):
        assert one.messages[0].content == "Q"
        assert one.columns == beside


def test_tools_are_the_same_for_both_where_one_calls_in_turns_of_its_own() -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    agent = [*said("Q"), call, {"role": "tool_response", "content": "1"}, *answer("good")]
    for chosen, rejected in ((agent, said("Q", "bad")), (said("Q", "good"), agent)):
        pair = preference_of(row(messages=chosen, rejected_messages=rejected, tools=[{"name": "f"}]))
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert pair.chosen.columns == pair.rejected.columns == {"tools": tools}
        assert pair.chosen.is_agent and pair.rejected.is_agent


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"messages": said("Q", "A")}, "has no rejected answer; give rejected_response"),
    "two": (
        SHAPES["texts"] | {"rejected_response": "X"},
        "has rejected and rejected_response, of which",
    ),
    "no chosen": ({"prompt": "Q", "rejected": "bad"}, "rejected needs chosen beside it"),
    "no prompt": ({"chosen": "good", "rejected": "bad"}, "are answers without a prompt"),
    "empty text": (
        {"prompt": "Q", "chosen": "good", "rejected": " "},
        r"is empty.*conversation of rejected",
    ),
    "empty chosen": ({"prompt": "Q", "chosen": "", "rejected": "bad"}, r"is empty.*conversation of chosen"),
    "empty response": ({"query": "Q", "response": "A", "rejected_response": ""}, "must be a text that is not empty"),
    "empty prompt": (SHAPES["texts"] | {"prompt": " "}, "the prompt is empty; fill it or delete the row"),
    "empty query": ({"system": "S", "query": "", "response": "A", "rejected_response": "B"}, "the prompt is empty"),
    "empty last question": ({"messages": said("Q", "A", "", "B"), "rejected_response": "C"}, "the prompt is empty"),
    "list": (
        {"query": "Q", "response": "A", "rejected_response": ["bad"]},
        "must be a text that is not empty, not",
    ),
    "other prompt": ({"messages": said("Q", "A"), "rejected_messages": said("R", "B")}, "follow the same prompt"),
    "nothing shared": (
        {"chosen": said("Q", "A"), "rejected": said("R", "B")},
        "message 0 differs: user 'Q' and user 'R'",
    ),
    "mixed": ({"chosen": said("Q", "A"), "rejected": 3}, "rejected must be a list of messages, as chosen is"),
    "other last prompt": (
        {"messages": said("Q", "A", "Q2", "B"), "rejected_messages": said("Q", "A", "Q3", "C")},
        "must follow the same prompt, and message 2 differs: user 'Q2' and user 'Q3'",
    ),
    "other last prompt of whole conversations": (
        {"chosen": said("Q", "A", "Q2", "B"), "rejected": said("Q", "A", "Q3", "C")},
        "must follow the same prompt, and message 2 differs: user 'Q2' and user 'Q3'",
    ),
    "other last prompt of completions": (
        {"prompt": "Q", "chosen": said("", "A", "Q2", "B")[1:], "rejected": said("", "A", "Q3", "C")[1:]},
        "must follow the same prompt, and message 2 differs: user 'Q2' and user 'Q3'",
    ),
    "prompts that differ at their ends": (
        {"messages": said("Q" * 99 + "1", "A"), "rejected_messages": said("Q" * 99 + "2", "B")},
        "message 0 differs: user '…Q{20}1' and user '…Q{20}2'",
    ),
    "other system": (
        {
            "messages": [{"role": "system", "content": "S"}, *said("Q", "A")],
            "rejected_messages": [{"role": "system", "content": "T"}, *said("Q", "B")],
        },
        "message 0 differs: system 'S' and system 'T'",
    ),
    "other names": (
        {
            "messages": [{"role": "user", "content": "Q", "name": "a"}, *answer("A")],
            "rejected_messages": [{"role": "user", "content": "Q", "name": "b"}, *answer("B")],
        },
        "message 0 differs: user .*'a'.* and user .*'b'",
    ),
    "one goes on": (
        {"messages": said("Q", "A"), "rejected_messages": said("Q", "A", "Q2", "B")},
        "the rejected conversation goes on where the chosen one ends, after message 1",
    ),
    "ends with a question": (
        {"messages": said("Q", "A", "Q2"), "rejected_response": "B"},
        r"the chosen conversation ends with a message of the user \(str 'Q2'\)",
    ),
    "another prompt beside": (
        {"prompt": said("P"), "chosen": said("Q", "A"), "rejected": said("Q", "B")},
        "prompt beside them is another: at its message 0 chosen has user 'Q' and user 'P'",
    ),
    "alone": ({"query": "Q", "response": "A", "rejected_messages": said("Q", "B")}, "needs messages beside it"),
    "no answer": ({"messages": said("Q"), "rejected_response": "bad"}, "there must be an assistant message"),
    "nan": (SHAPES["texts"] | {"margin": float("nan")}, "margin must be a finite number, not float nan"),
    "half a reference": (SHAPES["texts"] | {"ref_chosen_logps": -1.0}, "has ref_chosen_logps alone"),
    "no log-probability": (
        SHAPES["texts"] | {"ref_chosen_logps": -1.0, "ref_rejected_logps": 0.5},
        "are log-probabilities, and not above 0",
    ),
    "nan reference": (
        SHAPES["texts"] | {"ref_chosen_logps": float("nan"), "ref_rejected_logps": -1.0},
        "ref_chosen_logps must be a finite number, not float nan",
    ),
    "text margin": (SHAPES["texts"] | {"margin": "two"}, "margin must be a finite number, not str 'two'"),
    "margin beyond fp32": (SHAPES["texts"] | {"margin": 1e39}, "margin must be a finite number, not float 1e.39"),
    "margin beyond float": (SHAPES["texts"] | {"margin": 10**400}, "margin must be a finite number, not int 1000"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_and_line(fault: str) -> None:
    fields, message = FAULTS[fault]
    with pytest.raises(DataError, match=rf"^pairs\.jsonl:7: .*{message}"):
        preference_of(row(**fields))


def encoder(folder: Path, **settings: Any) -> Encoder:
    return Encoder(Encoding(tokenizer=folder, rows="pairs", loss_scale="last_round", **settings))


def test_a_pair_is_an_item_with_the_chosen_answer_first(tokenizer_folder: Path, bpe: Any) -> None:
    given = row(messages=said("two", "four", "six", "seven apples"), rejected_response="ten", margin=1.5)
    chunk = encoder(tokenizer_folder).encode([given])
    assert chunk.items == [2]
    learned = [bpe.decode(sample.ids[sample.weights > 0]) for sample in chunk.samples]
    assert learned == ["seven apples<|im_end|>", "ten<|im_end|>"]
    shared = int(chunk.samples[0].weights.argmax()) - 1
    assert [dict(s.columns) for s in chunk.samples] == [
        {"chosen": 1, "margin": 1.5, "shared": 0},
        {"chosen": 0, "margin": 1.5, "shared": shared},
    ]
    prompts = [sample.ids[sample.weights == 0].tolist() for sample in chunk.samples]
    assert prompts[0][:-1] == prompts[1][:-1], "but for what the template writes behind the answer"


def test_a_reference_s_log_probabilities_are_kept_where_they_are_read(tokenizer_folder: Path) -> None:
    told = row(prompt="Q", chosen="good", rejected="bad", ref_chosen_logps=-2, ref_rejected_logps=-3.5)
    untold = row(prompt="Q", chosen="good", rejected="bad")
    chunk = encoder(tokenizer_folder, ref_log_probs=True).encode([told, untold])
    found = [sample.columns["reference"] for sample in chunk.samples]
    assert found[:2] == [-2, -3.5] and np.isnan(found[2:]).all()
    assert "reference" not in encoder(tokenizer_folder).encode([told]).samples[0].columns
    assert not +chunk.remarks


def test_equal_answers_are_counted(tokenizer_folder: Path) -> None:
    same = row(prompt="Q", chosen="good", rejected="good")
    whole = row(chosen=said("Q", "good"), rejected=said("Q", "good"))
    chunk = encoder(tokenizer_folder).encode([same, row(prompt="Q", chosen="good", rejected="bad"), whole])
    assert (chunk.items, chunk.remarks[EQUAL]) == ([2], 2)
    assert str(chunk.first[EQUAL]) == "pairs.jsonl:7"


@pytest.mark.parametrize("strategy", ["delete", "left", "right", "raise"])
def test_an_answer_beyond_the_limit(tokenizer_folder: Path, strategy: Any) -> None:
    long = row(prompt="Q " * 30, chosen="A", rejected="B")
    made = encoder(tokenizer_folder, max_length=20, truncation_strategy=strategy)
    if strategy == "raise":
        with pytest.raises(DataError, match=r"pairs\.jsonl:7: has \d+ tokens, above data\.max_length=20"):
            made.encode([long])
        return
    chunk = made.encode([long])
    reasons = {"delete": {"longer than max_length": 1}, "right": {"nothing to learn": 1}, "left": {}}
    assert chunk.dropped == reasons[strategy]
    assert chunk.items == ([2] if strategy == "left" else [])


def test_answers_that_are_cut_to_the_same_tokens_are_no_pair(tokenizer_folder: Path) -> None:
    same = row(prompt="Q", chosen="seven " * 40 + "A", rejected="seven " * 40 + "B")
    assert encoder(tokenizer_folder).encode([same]).items == [2]
    cut = encoder(tokenizer_folder, max_length=30, truncation_strategy="right").encode([same])
    assert (cut.items, cut.dropped, str(cut.first[CUT_ALIKE])) == ([], {CUT_ALIKE: 1}, "pairs.jsonl:7")


def test_half_a_pair_without_answer_is_no_pair(tokenizer_folder: Path) -> None:
    long = encoder(tokenizer_folder).encode([row(prompt="Q", chosen="A", rejected="seven " * 40)])
    cut = len(long.samples[0].ids)
    made = encoder(tokenizer_folder, max_length=cut - 3, truncation_strategy="left")
    assert made.encode([row(prompt="Q", chosen="A", rejected="seven " * 40)]).items == [2]
    right = encoder(tokenizer_folder, max_length=cut - 4, truncation_strategy="right")
    assert right.encode([row(prompt="Q", chosen="A", rejected="seven " * 40)]).dropped == {"nothing to learn": 1}


def test_pairs_through_the_cache(tokenizer_folder: Path, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [
        {"prompt": f"What is {n} + 1?", "chosen": str(n + 1), "rejected": str(n), "margin": n / 2} for n in range(9)
    ]
    path = write_jsonl("pairs.jsonl", rows)
    settings = Encoding(tokenizer=tokenizer_folder, rows="pairs", loss_scale="last_round")
    cache = TokenCache.open(TokenCache.build(resolve([str(path)]), settings, cache_dir=tmp_path / "cache"))
    assert np.diff(cache.items).tolist() == [2] * 9
    assert [cache[index].columns["margin"] for index in (0, 1, 16, 17)] == [0.0, 0.0, 4.0, 4.0]
    assert [cache[index].columns["chosen"] for index in (0, 1, 16, 17)] == [1.0, 0.0, 1.0, 0.0]
    assert str(cache.origin(17)) == f"{path}:9"
