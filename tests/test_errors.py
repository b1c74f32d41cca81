"""Errors travel between ranks by pickle, and arrive as they were."""

from __future__ import annotations

import pickle

from megabatch.errors import ConfigError, DataError, ElsewhereError, Fault
from megabatch.rollout.engine import Completion, UnservedError


def test_an_error_of_another_rank_arrives_with_its_cause() -> None:
    found = pickle.loads(pickle.dumps(ElsewhereError(ConfigError("wrong"), 3)))
    assert isinstance(found.error, ConfigError) and found.rank == 3
    assert str(found) == "rank 3 failed: wrong"


def test_names_neither_break_a_fault_into_lines_nor_control_a_terminal() -> None:
    name = "a\n\x1b[2J\x9b\r四.jsonl"
    shown = "\\x1b[2J\\x9b\\x0d四.jsonl is empty"
    assert str(DataError(f"{name} is empty")) == f"a\n{shown}"
    assert str(Fault("data.dataset:", None, f"{name} is empty", bare=True)) == f"data.dataset: a\\n{shown}"
    two = [Fault("a", 1, "is wrong"), Fault("b", None, f"has {name}", bare=True)]
    assert len(str(ConfigError(two)).splitlines()) == 3


def test_lost_servers_arrive_with_what_was_made() -> None:
    made = Completion(key="0/0", ids=(1,), logps=(-0.5,), versions=(2,), finish="stop")
    found = pickle.loads(pickle.dumps(UnservedError("gone", [made])))
    assert str(found) == "gone" and found.completions == (made,)
