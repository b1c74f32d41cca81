"""Rows with a question and several models' solutions, each marked right or wrong, as preferences.

{"question": "…", "ground_truth": "…", "6b_finetuning": {"is_correct": false, "solution": "…"}, …}

python recipes/gsm8k_dpo.py --dataset solutions.jsonl --preprocess recipes/rows/model_solutions.py:pairs --local
python recipes/gsm8k_rm.py --dataset solutions.jsonl --preprocess recipes/rows/model_solutions.py:pairs --local
python recipes/gsm8k_kto.py --dataset solutions.jsonl --preprocess recipes/rows/model_solutions.py:labels --local

Rows of other files pass unchanged.
"""

from __future__ import annotations

from typing import Any


def pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Each right solution of a question against each wrong one; none if all are right, or all wrong."""
    solutions = _solutions(row)
    if not solutions:
        return [row]
    right = [one["solution"] for one in solutions if one["is_correct"]]
    wrong = [one["solution"] for one in solutions if not one["is_correct"]]
    return [{"query": row["question"], "response": a, "rejected_response": b} for a in right for b in wrong]


def labels(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Each solution with whether it is right."""
    solutions = _solutions(row)
    if not solutions:
        return [row]
    return [{"query": row["question"], "response": one["solution"], "label": one["is_correct"]} for one in solutions]


def _solutions(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for value in row.values() if isinstance(value, dict) and "is_correct" in value]
