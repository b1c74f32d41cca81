"""The graph alone: its faults, its order, and who may start."""

from __future__ import annotations

import pytest

from megabatch import (
    Chain,
    Checkpoint,
    Command,
    ConversionRequest,
    Convert,
    Recipe,
    Step,
    ended,
    notok,
    ok,
    output,
    singleton,
)
from megabatch.chain.graph import descendants, graph_faults, in_order, may_start
from megabatch.chain.outputs import Reference, references, resolved

NOTHING = Command(["true"])
TRAIN = Recipe(name="train", task="pt")


def chain(*steps: Step) -> Chain:
    return Chain(name="c", steps=steps)


def reading(text: str, *, after: tuple = (), name: str = "reader") -> Step:  # type: ignore[type-arg]
    return Step(name, Command(["cat", text]), after=after)


def said(*steps: Step) -> str:
    return "\n".join(map(str, graph_faults(chain(*steps))))


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([], "chain.steps must consist of"),
        (["a"], "chain.steps must consist of"),
        ([Step("a", NOTHING), Step("a", NOTHING)], "step.name='a' is the name of 2 steps"),
        ([Step("a b", NOTHING)], "step.name='a b' must be letters"),
        ([Step("train", NOTHING), Step("b", NOTHING, after=ok("trian"))], "b.after='trian' is not a step.*try train"),
        ([Step("a", NOTHING), Step("b", NOTHING, after=(*ok("a"), *ended("a")))], "b.after='a' is named twice"),
        ([Step("a", NOTHING, after=ok("a"))], "a.after is a cycle: a after a"),
        (
            [
                Step("a", NOTHING, after=ok("c")),
                Step("b", NOTHING, after=ok("a")),
                Step("c", NOTHING, after=ended("b")),
            ],
            "a.after is a cycle: a after c after b after a",
        ),
        ([Step("a", NOTHING, after="b")], "must consist of ok"),  # type: ignore[arg-type]
        ([Step("a", NOTHING, after=ok("b")[0]), Step("b", NOTHING)], "must consist of ok"),  # type: ignore[arg-type]
        ([Step("a", NOTHING, links=2)], "a.links=2 is for training runs"),
        ([Step("a", TRAIN, links=0)], "at least 1"),
        (
            [Step("a", TRAIN, links=2), Step("b", NOTHING), Step("c", NOTHING, after=ok("a", "b"))],
            "c.after waits for a",
        ),
        ([Step("a", TRAIN, links=2), Step("b", TRAIN, after=ok("a"), links=2)], "b.after waits for a, which has 2"),
    ],
)
def test_faults_of_the_graph(steps: list[Step], says: str) -> None:
    import re

    assert re.search(says, said(*steps), re.DOTALL)


def test_outputs_must_be_made_and_be_sure_to_be_there() -> None:
    train = Step("train", TRAIN)
    to_mcore = Step("convert", Convert(ConversionRequest(to_mcore=True, model="x")), after=ok("train"))
    command = Step("measure", Command(["x"], outputs=("scores.json",)), after=ok("convert"))
    made = (output("train").hf, output("convert").mcore, output("measure").file("scores.json"), output("train").folder)
    after = ok("measure")
    assert not said(
        train, to_mcore, command, *(reading(text, after=after, name=f"r{i}") for i, text in enumerate(made))
    )
    assert "output('nobody') is not a step" in said(train, reading(output("nobody").hf))
    assert "is its own output" in said(reading(output("reader").folder))
    assert "makes mcore, not hf" in said(train, to_mcore, reading(output("convert").hf, after=ok("convert")))
    declared = said(train, to_mcore, command, reading(output("measure").file("other"), after=after))
    assert "does not make file other; it declares scores.json" in declared
    unsaved = Step("train", Recipe(name="t", task="pt", checkpoint=Checkpoint(save_safetensors=False)))
    assert "makes no hf" in said(unsaved, reading(output("train").hf, after=ok("train")))
    for conditions in ((), ended("train"), notok("train"), ok("other")):
        unsure = said(train, Step("other", NOTHING, after=ended("train")), reading(made[0], after=conditions))
        assert "reader may start without it" in unsure and "try after=ok('train')" in unsure


def test_references_are_found_and_replaced_wherever_they_stand() -> None:
    recipe = Recipe(name="x", task="pt", checkpoint=Checkpoint(load=output("a").checkpoint))
    command = Command(["x", f"--model={output('b').hf}/config.json"], environment={"M": output("c").mcore})
    assert references(recipe) == [Reference("a", "checkpoint")]
    assert references(command) == [Reference("b", "hf"), Reference("c", "mcore")]
    got = resolved(command, lambda ref: f"/{ref.step}/{ref.what}")
    assert got.argv == ["x", "--model=/b/hf/config.json"] and got.environment == {"M": "/c/mcore"}
    assert resolved(recipe, lambda ref: "/here").checkpoint.load == "/here"


def test_order_and_descendants() -> None:
    steps = [
        Step("d", NOTHING, after=ok("b", "c")),
        Step("c", NOTHING, after=notok("a")),
        Step("b", NOTHING, after=ended("a")),
        Step("a", NOTHING),
        Step("e", NOTHING, after=singleton()),
    ]
    assert [step.name for step in in_order(chain(*steps))] == ["a", "c", "b", "d", "e"]
    assert descendants(chain(*steps), {"b"}) == {"b", "d"}
    assert descendants(chain(*steps), {"a"}) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("edges", "fate", "may"),
    [
        (ok("a"), "done", True),
        (ok("a"), "failed", False),
        (ok("a"), "never", False),
        (notok("a"), "done", False),
        (notok("a"), "failed", True),
        # Slurm cancels a job that can never start, and counts it as one that did not end well
        (notok("a"), "never", True),
        (ended("a"), "done", True),
        (ended("a"), "failed", True),
        (ended("a"), "never", True),
        (singleton(), "failed", True),
        (ok("a", "b"), "done", None),
        (ok("a", "b"), "failed", False),
    ],
)
def test_who_may_start(edges: tuple, fate: str, may: bool | None) -> None:  # type: ignore[type-arg]
    assert may_start(Step("x", NOTHING, after=edges), {"a": fate}) is may  # type: ignore[dict-item]
