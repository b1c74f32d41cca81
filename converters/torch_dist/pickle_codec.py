"""Pickles of torch's checkpoint format without torch: written from plain records, read without calling anything.

A pickle names functions and classes and asks the reader to call them. `load` never calls them: it returns their names,
with the arguments and the state that they would have received.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Iterable
from typing import Any

from megabatch.errors import ConversionError
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by its name, never imported."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A global called with arguments."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An object made without arguments and then given its state."""

    kind: Global
    state: Any


@dataclass(frozen=True, slots=True)
class Persistent:
    """A persistent id: torch's reference to a storage."""

    key: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """A list, or a dict of pairs, whose parts are made while they are written."""

    parts: Iterable[Any]
    pairs: bool = False


def dump(value: Any) -> bytes:
    """A protocol 2 pickle of None, bool, int, float, str, tuples, lists, dicts and the records above."""
    writer = _Writer()
    writer.save(value)
    return b"\x80\x02" + bytes(writer.out) + pickle.STOP


class _Writer:
    """Emits opcodes; globals and strings that repeat are written once."""

    def __init__(self) -> None:
        self.out = bytearray()
        self._memo: dict[Global | str, int] = {}

    def save(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self.out += {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
        elif isinstance(value, int):
            self.out += _integer(value)
        elif isinstance(value, float):
            self.out += pickle.BINFLOAT + struct.pack(">d", value)
        elif isinstance(value, str):
            self._once(value, pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode())
        elif isinstance(value, Global):
            self._once(value, pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, tuple):
            self._sequence(pickle.MARK, value, pickle.TUPLE)
        elif isinstance(value, list):
            self._sequence(pickle.EMPTY_LIST + pickle.MARK, value, pickle.APPENDS)
        elif isinstance(value, dict):
            self.save(Stream(value.items(), pairs=True))
        elif isinstance(value, Stream) and value.pairs:
            sides = (side for pair in value.parts for side in pair)
            self._sequence(pickle.EMPTY_DICT + pickle.MARK, sides, pickle.SETITEMS)
        elif isinstance(value, Stream):
            self._sequence(pickle.EMPTY_LIST + pickle.MARK, value.parts, pickle.APPENDS)
        elif isinstance(value, Call):
            self._pair(value.function, value.args, pickle.REDUCE)
        elif isinstance(value, Instance):
            self._pair(value.kind, (), pickle.NEWOBJ)
            self.save(value.state)
            self.out += pickle.BUILD
        elif isinstance(value, Persistent):
            self.save(value.key)
            self.out += pickle.BINPERSID
        else:
            raise TypeError(f"cannot pickle {value!r}")

    def _once(self, key: Global | str, code: bytes) -> None:
        if key in self._memo:
            self.out += pickle.LONG_BINGET + struct.pack("<I", self._memo[key])
            return
        self._memo[key] = len(self._memo)
        self.out += code + pickle.LONG_BINPUT + struct.pack("<I", self._memo[key])

    def _sequence(self, before: bytes, values: Iterable[Any], after: bytes) -> None:
        self.out += before
        for value in values:
            self.save(value)
        self.out += after

    def _pair(self, kind: Global, args: tuple[Any, ...], after: bytes) -> None:
        self.save(kind)
        self.save(args)
        self.out += after


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return pickle.BININT1 + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x09" + value.to_bytes(9, "little", signed=True)


class Recorded:
    """An object that a pickle describes: its class is named like the global, and nothing was called."""

    module = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Recorded:
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A value of the state. Raises: KeyError when it has none of this name."""
        if not isinstance(self.state, dict):
            raise KeyError(name)
        return self.state[name]


class _Ordered(dict[Any, Any]):
    """collections.OrderedDict, of which a module's state keeps notes in attributes: those are left aside."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle._Unpickler):
    """The Python implementation, whose memo is a dict: a corrupt index costs no memory, as it does in C."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._kinds: dict[tuple[str, str], type[Any]] = {("collections", "OrderedDict"): _Ordered}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._kinds:
            self._kinds[key] = type(name, (Recorded,), {"module": module})
        return self._kinds[key]

    def persistent_load(self, key: Any) -> Persistent:
        return Persistent(tuple(key))


def load(raw: bytes, *, place: str) -> Any:
    """The value of a pickle, objects as `Recorded` and classes as subclasses of it.

    Raises: ConversionError naming `place` for anything that is no whole pickle.
    """
    try:
        return _Reader(io.BytesIO(raw)).load()
    except Exception as error:  # a corrupt pickle can raise any exception
        raise ConversionError(f"{place}: not a valid pickle: {type(error).__name__} {error}") from error
