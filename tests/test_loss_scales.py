"""The parts of a turn and their weights, worked out by hand."""

from __future__ import annotations

import pytest

from megabatch.loss_scales import BASES, SCALES, parse

SEED_THINK = (
    "<seed:think><seed:cot_budget_reflect>The current thinking budget is 0, so I will directly start answering the "
    "question.</seed:cot_budget_reflect>\n</seed:think>"
)


def weighed(loss_scale: str, text: str) -> list[tuple[str, float]]:
    return [(text[start:stop], weight) for start, stop, weight in parse(loss_scale).segments(text)]


@pytest.mark.parametrize(
    ("loss_scale", "text", "expected"),
    [
        ("react", "Thought: sum\nAction: add\nAction Input: 2\nObservation: 4\nFinal Answer: 4",
         [("Thought:", 1), (" sum\n", 1), ("Action:", 2), (" add\n", 2), ("Action Input:", 2), (" 2\n", 2),
          ("Observation:", 2), (" 4\n", 0), ("Final Answer:", 1), (" 4", 1)]),
        ("react", "Well. Observation: 4", [("Well. ", 1), ("Observation:", 2), (" 4", 0)]),
        ("react", "no keyword", [("no keyword", 1)]),
        ("alpha_umi", "Next: caller", [("Next:", 2), (" caller", 2)]),
        ("qwen", "✿FUNCTION✿: f\n✿ARGS✿: 1\n✿RESULT✿: 2\n✿RETURN✿: 3",
         [("✿FUNCTION✿:", 2), (" f\n", 2), ("✿ARGS✿:", 2), (" 1\n", 2), ("✿RESULT✿:", 2), (" 2\n", 0),
          ("✿RETURN✿:", 1), (" 3", 1)]),
        ("agentflan", "Thought: so\nAction: f\naction input 1\nObservation: 2",
         [("Thought:", 1), (" so\n", 1), ("Action:", 1), (" f\n", 3), ("action input", 1), (" 1\n", 3),
          ("Observation:", 2), (" 2", 0)]),
        ("hermes", "a<tool_call>\n1\n</tool_call>b<tool_call>2</tool_call>",
         [("a", 1), ("<tool_call>\n1\n</tool_call>", 2), ("b", 1), ("<tool_call>2</tool_call>", 2)]),
        ("ignore_empty_think", "<think>\n\n</think>\n\nfour", [("<think>\n\n</think>\n\n", 0), ("four", 1)]),
        ("ignore_empty_think", "\n</think>\n\nfour", [("\n</think>\n\n", 0), ("four", 1)]),
        ("ignore_empty_think", "<think>\nadd\n</think>\n\nfour", [("<think>\nadd\n</think>\n\nfour", 1)]),
        ("ignore_empty_think", "so <think></think>", [("so <think></think>", 1)]),
        ("ignore_empty_think", "<|channel>thought\n<channel|>4", [("<|channel>thought\n<channel|>", 0), ("4", 1)]),
        ("ignore_empty_think", "</mm:think>\n\nfour", [("</mm:think>\n\n", 0), ("four", 1)]),
        ("ignore_empty_think", f"{SEED_THINK}\nfour", [(f"{SEED_THINK}\n", 0), ("four", 1)]),
        ("ignore_think_prefix", "<think>\nadd</think>", [("<think>\n", 0), ("add</think>", 1)]),
        ("hermes+ignore_empty_think", "<think></think><tool_call>1</tool_call>",
         [("<think></think>", 0), ("<tool_call>1</tool_call>", 2)]),
        ("react+hermes", "Observation:<tool_call>1</tool_call>Action:<tool_call>2</tool_call>",
         [("Observation:", 2), ("<tool_call>1</tool_call>", 0), ("Action:", 2), ("<tool_call>2</tool_call>", 4)]),
        ("last_round", "any", [("any", 1)]),
    ],
)  # fmt: skip
def test_segments(loss_scale: str, text: str, expected: list[tuple[str, float]]) -> None:
    assert weighed(loss_scale, text) == expected


def test_a_question_weighs_the_whole_answer() -> None:
    scale = parse("agentflan+hermes")
    text = "Action: f<tool_call>1</tool_call>"
    assert scale.segments(text, "What is the value of x?") == [(0, 9, 3.0), (9, len(text), 6.0)]
    assert scale.segments(text, "Now?") == [(0, 7, 1.0), (7, 9, 3.0), (9, len(text), 6.0)]


def test_the_base_comes_first_and_is_default_where_none_is_named() -> None:
    assert [parse(base).base for base in BASES] == list(BASES)
    assert parse("hermes").base == "default"
    found = parse("last_round+hermes+ignore_empty_think")
    assert (found.base, found.scales) == ("last_round", (SCALES["hermes"], SCALES["ignore_empty_think"]))


@pytest.mark.parametrize(
    ("loss_scale", "message"),
    [
        ("hermess", "not 'hermess'; try hermes"),
        ("last-round", "try last_round"),
        ("", "must be one of default"),
        ("hermes+all", "names all behind its beginning"),
        ("default+", "not ''"),
    ],
)
def test_anything_else_is_refused(loss_scale: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(loss_scale)
