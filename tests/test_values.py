"""What `megabatch.values.dataclass` makes is what `dataclasses.dataclass` makes."""

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import KW_ONLY, field
from typing import Any

import pytest

from megabatch import values


def _declared(dataclass: Callable[..., Any]) -> tuple[type, ...]:
    """The same classes by either decorator."""

    @dataclass(frozen=True, slots=True)
    class Point:
        """Positional fields, defaults, what is not compared or shown, and what is not an argument."""

        x: int
        y: float = 0.5
        tags: list[str] = field(default_factory=list)
        note: str | None = field(default=None, compare=False, repr=False)
        kind: str = field(default="point", init=False)
        seen: list[int] = field(default_factory=list, init=False)

    @dataclass(frozen=True, slots=True)
    class Row:
        """Fields by name behind a marker, which a subclass adds to."""

        name: str
        _: KW_ONLY
        split: str = "row"

    @dataclass(frozen=True, slots=True)
    class Renamed(Row):
        """A field of its own before the inherited ones by name."""

        new: str = ""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Group:
        """Lists become tuples, as groups of a recipe store them."""

        names: Any = ()
        required: int

        def __post_init__(self) -> None:
            object.__setattr__(self, "names", tuple(self.names))

    @dataclass(frozen=True, slots=True)
    class Empty:
        """No field."""

    @dataclass(frozen=True, slots=True)
    class Own:
        """Methods of its own stay."""

        x: int

        def __hash__(self) -> int:
            return 7

        def __repr__(self) -> str:
            return f"own {self.x}"

    return Point, Row, Renamed, Group, Empty, Own


OURS, STANDARD = _declared(values.dataclass), _declared(dataclasses.dataclass)
ARGUMENTS = (
    [((1,), {}), ((1, 2.0, ["a"]), {"note": "n"})],
    [(("a",), {"split": "b"})],
    [
        (("a", "new"), {}),
        (("a",), {"new": "n", "split": "c"}),
    ],
    [((), {"required": 1, "names": ["a", "b"]})],
    [((), {})],
    [((3,), {})],
)
PAIRS = [
    pytest.param(ours, standard, *arguments, id=f"{ours.__name__}-{number}")
    for ours, standard, each in zip(OURS, STANDARD, ARGUMENTS, strict=True)
    for number, arguments in enumerate(each)
]


@pytest.mark.parametrize(("ours", "standard", "args", "kwargs"), PAIRS)
def test_instances_are_alike(ours: type, standard: type, args: Any, kwargs: Any) -> None:
    made, known = ours(*args, **kwargs), standard(*args, **kwargs)
    assert repr(made) == repr(known)
    assert dataclasses.asdict(made) == dataclasses.asdict(known)
    assert made == ours(*args, **kwargs)
    assert made != known
    assert made.__eq__(known) is NotImplemented
    assert copy.copy(made) == made == copy.deepcopy(made)
    assert [f.name for f in dataclasses.fields(made)] == [f.name for f in dataclasses.fields(known)]
    assert str(inspect.signature(ours)) == str(inspect.signature(standard))
    assert ours.__match_args__ == standard.__match_args__
    assert ours.__init__.__qualname__ == standard.__init__.__qualname__
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.x = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del made.x
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        ours(*args, **kwargs, other=1)


def test_what_is_compared_and_hashed() -> None:
    point, _, _, group, empty, own = OURS
    assert point(1, note="a") == point(1, note="b") != point(2)
    assert point(1).tags is not point(1).tags
    assert dataclasses.replace(group(required=1), names=["a"]).names == ("a",)
    assert len({group(required=1), group(required=1), group(required=2)}) == 2
    assert hash(own(1)) == 7 and empty() == empty() and hash(empty()) == hash(empty())
    assert not hasattr(point(1), "__dict__")
    with pytest.raises(TypeError, match="unhashable"):
        hash(point(1))


@values.dataclass(frozen=True, slots=True)
class _Sent:
    """At a module's top, where pickle finds it."""

    x: int
    items: tuple[int, ...] = ()


def test_pickled_and_sent() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(_Sent(1, (2, 3)), protocol)) == _Sent(1, (2, 3))


def test_an_instance_within_itself_is_shown() -> None:
    around: list[Any] = []
    made = _Sent(1, around)  # type: ignore[arg-type]
    around.append(made)
    assert repr(made) == "_Sent(x=1, items=[...])"


def test_other_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="frozen dataclasses with slots"):
        values.dataclass(frozen=False, slots=True)
