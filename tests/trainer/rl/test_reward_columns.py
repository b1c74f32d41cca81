"""What rewards get of rows that have not all the same columns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megabatch import Data
from megabatch.data.rows.files import Origin, Row
from megabatch.rewards.own import Own
from megabatch.rewards.rewards import Rewards
from megabatch.rewards.sample import RewardSample
from megabatch.trainer.rl.prompts import Prompts, _columns_of

ROWS: tuple[dict[str, Any], ...] = (
    {"query": "1+1?", "response": "2", "level": 3},
    {"query": "2+2?"},
    {"query": "3+3?", "response": "6", "level": None, "source": "made"},
    {
        "messages": [{"role": "user", "content": "4+4?"}, {"role": "assistant", "content": "8"}],
        "tools": [{"name": "sum"}],
    },
)
SOURCE = """
def leveled(completions, level, solution):
    return [None if one is None else float(one) for one in level]
def any_name(completions, **columns):
    return [float(columns["source"][place] == "made") for place in range(len(completions))]
"""


def prompts() -> Prompts:
    origins = [Origin("rows", number, is_line=True) for number in range(len(ROWS))]
    rows = {origin: Row(origin, fields) for origin, fields in zip(origins, ROWS, strict=True)}
    data: Any = SimpleNamespace(origin=origins.__getitem__)
    run: Any = SimpleNamespace(recipe=SimpleNamespace(data=Data(dataset=["rows"])))
    return Prompts(data, rows, run, _columns_of(rows.values(), Data(dataset=["rows"])))


def test_a_row_has_every_column_that_another_has() -> None:
    given = prompts()
    assert given.columns == ("level", "solution", "source", "tools")
    found = [given.asked(index).for_rewards for index in range(len(ROWS))]
    assert found[0] == {"level": 3, "solution": "2", "source": None, "tools": None}
    assert found[1] == dict.fromkeys(given.columns)
    assert found[2] == {"level": None, "solution": "6", "source": "made", "tools": None}
    assert found[3]["solution"] == "8" and found[3]["tools"] and found[3]["level"] is None


def test_the_column_of_a_row_does_not_depend_on_the_rows_beside_it(tmp_path: Path) -> None:
    """Each prompt is a call of its own here: the second has no column that the functions read."""
    file, given = tmp_path / "mine.py", prompts()
    file.write_text(SOURCE)
    samples = [
        RewardSample(key=f"1/{index}/0", prompt=[], completion="", ids=(), columns=given.asked(index).for_rewards)
        for index in range(len(ROWS))
    ]
    own = [Own(f"{file}:leveled"), Own(f"{file}:any_name")]
    with Rewards(own, weights=None, workers=4, timeout_s=60) as rewards:
        found = rewards.of(samples)
    assert [str(one) for one, _ in found.values] == ["3.0", "nan", "nan", "nan"] and not found.failures
    assert [one for _, one in found.values] == [0, 0, 1, 0]
