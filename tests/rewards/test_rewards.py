"""All rewards of a run: functions of users in processes that crash and hang, and what that costs."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megabatch.errors import ConfigError, RewardError
from megabatch.rewards.lengths import Cosine, Format
from megabatch.rewards.named import check_reward
from megabatch.rewards.own import Own
from megabatch.rewards.pool import Call, Failed, Pool
from megabatch.rewards.rewards import Rewards, Scores
from megabatch.rewards.sample import RewardSample

SOURCE = """
import asyncio, os, signal, sys, time

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def faulty(completions, **columns):
    print("this goes to stderr, not into the replies")
    for text in completions:
        if text == "raise":
            raise ValueError("no such answer")
        if text == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if text == "leave":
            sys.exit(3)
        if text == "hang":
            time.sleep(600)
    return [None if text == "none" else 1 for text in completions]

async def slowly(completions, level, **columns):
    async def one(text, level):
        await asyncio.sleep(0)
        return level
    return await asyncio.gather(*(one(*pair) for pair in zip(completions, level)))

def trl(prompts, completions, completion_ids, **columns):
    return [len(ids) for prompt, completion, ids in zip(prompts, completions, completion_ids)
            if prompt[-1]["role"] == "user" and completion[0]["content"]]

def annotated(completions: list[list[dict[str, str]]]):
    return [len(completion[0]["content"]) for completion in completions]

class Swift:
    def __call__(self, completions, response_token_ids, messages, **columns):
        return [len(ids) + len(m) for ids, m in zip(response_token_ids, messages)]

def whole_groups(completions, **columns):
    return [len(completions)] * len(completions)

def forks(completions):
    os.fork()  # and forgets os._exit in the child
    return [float(len(text)) for text in completions]

async def keeps_a_client(completions):
    loop = globals().setdefault("loop", asyncio.get_running_loop())
    return [float(loop is asyncio.get_running_loop())] * len(completions)

class Silent(Exception):
    def __str__(self): raise RuntimeError("no text")

def silent(completions): raise Silent
def backtracks(completions, where):
    import re
    open(where[0], "w").write(str(os.getpid()))
    re.match("(a+)+$", "a" * 60 + "b")  # for years, and no other thread of the process runs meanwhile
def wordy(completions): raise ValueError("first line\\n" + "x" * 10_000)
def by_number(completions): return {number: 1.0 for number in range(len(completions))}
def unordered(completions): return {0.0, 1.0}
def characters(completions): return b"\\x01" * len(completions)
def endless(completions):
    while True: yield 1.0
def large(completions): return [10**400] * len(completions)
def beyond_fp32(completions): return [1e39] * len(completions)
def short(completions): return [1.0]
def word(completions): return ["high"] * len(completions)
def infinite(completions): return [float("inf")] * len(completions)
def nothing(completions): return None
def needs(completions, answer): return [0.0] * len(completions)
def always(completions): raise KeyError("solution")
def no_completions(texts): return []
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(SOURCE)
    return path


def samples(*texts: str, group: int = 2) -> list[RewardSample]:
    return [
        RewardSample(
            key=f"7/{number // group}/{number % group}",
            prompt=[{"role": "user", "content": "go"}],
            completion=text,
            ids=range(10 + number),
            columns={"level": number},
        )
        for number, text in enumerate(texts)
    ]


def scores(file: Path, names: Sequence[str], given: list[RewardSample], *, workers: int = 2) -> Scores:
    own = [Own(f"{file}:{name}") for name in names]
    with Rewards(own, weights=None, workers=workers, timeout_s=20) as rewards:
        return rewards.of(given)


def columns(found: Scores) -> dict[str, list[float]]:
    return dict(zip(found.names, (list(column) for column in zip(*found.values, strict=True)), strict=True))


def test_functions_of_every_form_get_their_arguments(file: Path) -> None:
    given = samples("a", "bb", "ccc", "dddd")
    names = ["length", "slowly", "trl", "annotated", "Swift"]
    assert columns(scores(file, names, given)) == {
        "length": [1, 2, 3, 4],
        "slowly": [0, 1, 2, 3],
        "trl": [10, 11, 12, 13],
        "annotated": [1, 2, 3, 4],
        "Swift": [12, 13, 14, 15],
    }


def test_a_failure_costs_one_reward_of_one_sample(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = samples("raise", "ok", "crash", "ok", "none", "leave", "ok", "ok")
    with caplog.at_level(logging.WARNING):
        found = scores(file, ["faulty", "length"], given)
    faulty = columns(found)["faulty"]
    assert [math.isnan(value) for value in faulty] == [True, False, True, False, True, True, False, False]
    assert columns(found)["length"] == [5, 2, 5, 2, 4, 5, 2, 2]
    assert found.failures == {"faulty": 3}, "None is no failure"
    said = "\n".join(caplog.messages)
    assert "reward faulty of sample 7/0/0 is left out: ValueError: no such answer (mine.py:" in said
    assert "reward faulty of sample 7/1/0 is left out: its process was ended by SIGSEGV" in said
    assert "reward faulty of sample 7/2/1 is left out: its process ended with exit code 3" in said


def test_what_hangs_is_ended(file: Path) -> None:
    own = Own(f"{file}:faulty")
    with Rewards([own], weights=None, workers=2, timeout_s=10) as rewards:
        found = rewards.of(samples("ok", "hang", "ok", "ok"))
        assert [math.isnan(value) for (value,) in found.values] == [False, True, False, False]
        assert found.failures == {"faulty": 1}
        again = rewards.of(samples("ok", "ok"))
        assert again.values == ((1.0,), (1.0,)), "the processes that were ended are replaced"


def test_calls_hold_whole_groups(file: Path) -> None:
    found = scores(file, ["whole_groups"], samples(*"abcdefghij", group=5), workers=4)
    assert found.values == ((5.0,),) * 10


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "short returned 1 values for the 2 completions from sample 7/0/0 on; must be one for each"),
        ("word", "word returned 'high' for sample 7/0/0; must be a finite number or None"),
        ("infinite", "infinite returned inf for sample 7/0/0; must be a finite number or None"),
        ("nothing", "nothing returned None; must be a list, one number for each completion"),
        ("needs", "needs takes answer, and the rows have no such column; sample 7/0/0 has level"),
        ("always", "reward always failed for all 2 samples; the first is 7/0/0: KeyError: 'solution' (mine.py:"),
    ],
)
def test_what_is_no_reward_ends_the_run(file: Path, name: str, said: str) -> None:
    with pytest.raises(RewardError) as raised:
        scores(file, [name], samples("a", "b"), workers=1)
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{file}:lenght", "has no function lenght; did you mean length?"),
        ("{file}:no_completions", "no_completions must take the argument completions"),
        ("{file}", "must be a Python file and a function in it, such as my_rewards.py:brevity"),
    ],
)
def test_what_cannot_be_a_reward_is_refused_before_the_queue(file: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_reward(text.format(file=file))
    assert said in str(raised.value)


def test_a_total_leaves_out_what_is_missing() -> None:
    found = Scores(
        names=("a", "b"),
        weights=(2.0, 0.5),
        values=((1.0, math.nan), (math.nan, math.nan), (1.0, 4.0)),
        failures={},
    )
    assert found.total(0) == 2.0 and math.isnan(found.total(1)) and found.total(2) == 4.0
    assert found.named(2) == {"a": 1.0, "b": 4.0}


@pytest.fixture
def answers() -> Iterator[list[RewardSample]]:
    texts = [
        "<think>half</think><answer>\\frac{1}{2}</answer>",
        "so the result is \\boxed{0.5}",
        "I guess that the answer is 0.5",
        "#### 1/2",
        "<answer>0.25</answer>",
        "anything",
    ]
    solutions = ["0.5"] * 4 + ["$\\frac12$"] + [""]
    yield [
        RewardSample(key=f"0/{i}/0", prompt=[], completion=text, ids=range(10 * i), columns={"solution": solution})
        for i, (text, solution) in enumerate(zip(texts, solutions, strict=True))
    ]


def test_accuracy_and_cosine_share_one_verdict(answers: list[RewardSample]) -> None:
    pytest.importorskip("math_verify")
    check_reward("accuracy")
    cosine = Cosine(longest=100, wrong=(-0.5, 0.0), right=(1.0, 0.5))
    from megabatch.rewards.accuracy import Accuracy

    with Rewards([cosine, Accuracy(), Format()], weights=[1, 2, 3], workers=1, timeout_s=60) as rewards:
        found = rewards.of(answers)
    table = columns(found)
    assert table["accuracy"][:5] == [1, 1, 0, 1, 0], "an answer counts only where it is marked as one"
    assert math.isnan(table["accuracy"][5]) and math.isnan(table["cosine"][5])
    expected = [0.75 + 0.25, 0.75 + 0.25 * math.cos(math.pi * 0.1), -0.25 - 0.25 * math.cos(math.pi * 0.2)]
    assert table["cosine"][:3] == pytest.approx(expected)
    assert table["format"] == [1, 0, 0, 0, 0, 0]


def test_a_row_without_a_solution_is_named() -> None:
    pytest.importorskip("math_verify")
    from megabatch.rewards.accuracy import Accuracy

    with (
        Rewards([Accuracy()], weights=None, workers=1, timeout_s=60) as rewards,
        pytest.raises(
            RewardError, match=r"accuracy needs the column 'solution', and the row of sample 7/0/0 has level"
        ),
    ):
        rewards.of(samples("a"))


def test_a_child_that_a_function_forked_gives_no_second_values(file: Path) -> None:
    """They would be taken for those of the next call."""
    with Rewards([Own(f"{file}:forks")], weights=None, workers=1, timeout_s=20) as rewards:
        for texts in (("a", "bb"), ("ccc", "dddd"), ("eeeee", "f")):
            assert [value for (value,) in rewards.of(samples(*texts)).values] == [len(text) for text in texts]


def test_an_async_function_keeps_its_loop_from_call_to_call(file: Path) -> None:
    with Rewards([Own(f"{file}:keeps_a_client")], weights=None, workers=1, timeout_s=20) as rewards:
        assert [rewards.of(samples("a", "b")).values for _ in range(3)] == [((1.0,), (1.0,))] * 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("by_number", "must be a list, one number for each completion"),
        ("unordered", "must be a list, one number for each completion"),
        ("characters", "must be a list, one number for each completion"),
        ("endless", "endless returned more than 2 values for the 2 completions"),
        ("large", "must be a finite number or None"),
        ("beyond_fp32", "beyond_fp32 returned 1e+39 for sample 7/0/0; must be a finite number or None"),
    ],
)
def test_what_only_looks_like_rewards_ends_the_run(file: Path, name: str, said: str) -> None:
    with pytest.raises(RewardError) as caught:
        scores(file, [name], samples("a", "b"))
    assert said in str(caught.value)


def test_an_error_is_told_in_one_line_whatever_its_text(file: Path) -> None:
    with pytest.raises(RewardError, match=r"Silent: its text cannot be had \(RuntimeError\) \(mine.py:"):
        scores(file, ["silent"], samples("a", "b"))
    with pytest.raises(RewardError) as caught:
        scores(file, ["wordy"], samples("a", "b"))
    assert "ValueError: first line xxx" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


_KILLED = """
import sys
from megabatch.rewards.own import Own
from megabatch.rewards.pool import Call, Failed, Pool
from megabatch.rewards.rewards import Rewards
from megabatch.rewards.sample import RewardSample
rewards = Rewards([Own(sys.argv[1])], weights=None, workers=1, timeout_s=600)
rewards.of([RewardSample(key="1/0/0", prompt=[], completion="", ids=(), columns={"where": sys.argv[2]})])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_a_reward_within_a_regular_expression_ends_with_its_killed_caller(file: Path, tmp_path: Path) -> None:
    """Else it would compute on where no job's end cleans up."""
    where = tmp_path / "worker"
    caller = subprocess.Popen([sys.executable, "-c", _KILLED, f"{file}:backtracks", str(where)])
    while not (where.exists() and where.read_text()):
        assert caller.poll() is None
        time.sleep(0.05)
    worker = int(where.read_text())
    caller.kill()
    caller.wait()
    while is_running(worker):
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class HangingPool(Pool):
    """All hang but those with the text ok, without the time that it takes."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def map(self, calls: Iterable[Call]) -> list[list[Any] | Failed]:
        given = list(calls)
        self.asked += [len(call.samples) for call in given]
        return [
            [1.0] if call.samples[0].completion == "ok" else Failed("took more than 60 s", hung=True) for call in given
        ]


@pytest.mark.parametrize(("first", "tried"), [("hang", 8), ("ok", 40)])
def test_a_call_whose_first_samples_all_hang_is_given_up(first: str, tried: int, file: Path) -> None:
    """40 samples would take as long as 40 time limits; where one of the first does not hang, all are tried."""
    given, pool, failed = samples(first, *["hang"] * 39, group=40), HangingPool(), dict[str, str]()
    own = Own(f"{file}:length")
    with Rewards([own], weights=None, workers=1, timeout_s=60) as rewards:
        values = rewards._one_by_one(pool, Call(own, given), failed)
    assert pool.asked == [1] * tried
    assert values == ([1.0] if first == "ok" else [None]) + [None] * 39 and len(failed) == 40 - (first == "ok")
    assert failed["7/0/1"] == "took more than 60 s"
    last = "not tried alone: 8 before it hung" if first == "hang" else "took more than 60 s"
    assert failed["7/0/39"] == last
