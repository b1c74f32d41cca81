"""Errors travel between ranks by pickle, and arrive as they were."""

from __future__ import annotations

import pickle

from megabatch.errors import ConfigError, ElsewhereError
from megabatch.rollout.engine import Completion, UnservedError


def test_an_error_of_another_rank_arrives_with_its_cause() -> None:
    found = pickle.loads(pickle.dumps(ElsewhereError(ConfigError("wrong"), 3)))
    assert isinstance(found.error, ConfigError) and found.rank == 3
    assert str(found) == "rank 3 failed: wrong"


def test_lost_servers_arrive_with_what_was_made() -> None:
    made = Completion(key="0/0", ids=(1,), logps=(-0.5,), versions=(2,), finish="stop")
    found = pickle.loads(pickle.dumps(UnservedError("gone", [made])))
    assert str(found) == "gone" and found.completions == (made,)
