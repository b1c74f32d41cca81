"""The functions that make preferences of several models' solutions."""

from __future__ import annotations

from pathlib import Path

from megabatch.user_code import load_named

FILE = Path(__file__).parents[2] / "recipes" / "rows" / "model_solutions.py"
ROW = {
    "question": "Q",
    "ground_truth": "T",
    "a": {"is_correct": True, "solution": "1"},
    "b": {"is_correct": False, "solution": "2"},
    "c": {"is_correct": False, "solution": "3"},
}


def test_pairs_and_labels() -> None:
    pairs, _ = load_named(f"{FILE}:pairs", kind="function", example="")
    labels, _ = load_named(f"{FILE}:labels", kind="function", example="")
    assert [(one["response"], one["rejected_response"]) for one in pairs(ROW)] == [("1", "2"), ("1", "3")]
    assert [(one["query"], one["label"]) for one in labels(ROW)] == [("Q", True), ("Q", False), ("Q", False)]
    assert pairs({**ROW, "a": ROW["b"]}) == []
    other = {"query": "Q", "response": "A"}
    assert pairs(other) == labels(other) == [other]
