"""The proof that an expanded table uses every row of every Hugging Face tensor exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from megabatch.converters.mapping import Mapped, Piece
from megabatch.errors import ConversionError

FLOATS = ("F64", "F32", "F16", "BF16")
"""dtypes (safetensors' names) in which we move weights; others need a conversion that no table has yet."""
_SHOWN = 8


class TensorInfo(NamedTuple):
    """A tensor's description in a file's header."""

    dtype: str
    """safetensors' name, for example BF16."""
    shape: tuple[int, ...]


Span = tuple[Piece, Mapped]


def invert(tensors: Iterable[Mapped]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes that the tensors cover, in order of first use.

    Raises: ConversionError when two entries use the same rows, rows are left out, or a name occurs twice: a fault of
    the table.
    """
    spans: dict[str, dict[int | None, list[Span]]] = {}
    seen: set[tuple[str, int | None]] = set()
    for mapped in tensors:
        key = (mapped.name, mapped.expert)
        if key in seen:
            raise ConversionError(f"{_title(mapped)} is built by two entries of the table, one is {mapped.entry}")
        seen.add(key)
        _check_rows(mapped)
        for piece in mapped.pieces:
            spans.setdefault(piece.hf, {}).setdefault(piece.index, []).append((piece, mapped))
    return {name: _covered(name, by_index) for name, by_index in spans.items()}


def _check_rows(mapped: Mapped) -> None:
    rows = sum(piece.count for piece in mapped.pieces)
    if rows != mapped.shape[0] or any(piece.count <= 0 for piece in mapped.pieces):
        raise ConversionError(f"{_title(mapped)}: its pieces have {rows} rows, entry {mapped.entry}")


def _covered(name: str, by_index: Mapping[int | None, list[Span]]) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor whose rows are all used once."""
    shapes = {index: _tiled(name, spans) for index, spans in by_index.items()}
    shape = next(iter(shapes.values()))
    if set(shapes) == {None}:
        return shape
    odd = [index for index, other in shapes.items() if other != shape or index is None]
    if odd or sorted(index for index in shapes if index is not None) != list(range(len(shapes))):
        raise ConversionError(f"{name}: the table uses unequal or missing leading indices {sorted(map(str, shapes))}")
    return (len(shapes), *shape)


def _tiled(name: str, spans: list[Span]) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor (behind a leading index) whose rows the pieces use once each."""
    first, owner = spans[0]
    tail = owner.shape[1:]
    for piece, mapped in spans:
        if mapped.shape[1:] != tail:
            raise ConversionError(f"{name}: two row lengths, {tail} and {mapped.shape[1:]}, in entry {mapped.entry}")
        if (piece.step, piece.transposed) != (first.step, first.transposed):
            raise ConversionError(f"{name}: pieces that are strided in different ways, in entry {mapped.entry}")
    rows = _consecutive(name, spans) if first.step == 1 else _woven(name, spans)
    return (*tail, rows) if first.transposed else (rows, *tail)


def _consecutive(name: str, spans: list[Span]) -> int:
    position = 0
    for piece, mapped in sorted(spans, key=lambda span: span[0].rows):
        start = piece.rows[0]
        if start != position:
            word = "left out" if start > position else "used twice"
            raise ConversionError(
                f"{name}: rows {min(start, position)} to {max(start, position)} are {word} by the table, "
                f"next entry is {mapped.entry}"
            )
        position = piece.rows[1]
    return position


def _woven(name: str, spans: list[Span]) -> int:
    """Whether `step` pieces of equal length, starting one row apart, use every row once."""
    step, count = spans[0][0].step, spans[0][0].count
    starts = sorted(piece.rows[0] for piece, _ in spans)
    if starts != list(range(step)) or any(piece.count != count for piece, _ in spans):
        raise ConversionError(
            f"{name}: its pieces begin at {starts}, but {step} of equal length must begin at 0 to {step - 1}, "
            f"entry {spans[0][1].entry}"
        )
    return step * count


def compare(
    tensors: Sequence[Mapped],
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorInfo],
    *,
    family: str,
) -> None:
    """Compares the tensors that the table needs with those in a folder.

    Raises: ConversionError with every fault (at most eight spelled out): missing, left over, shape, dtype.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    users = _users(tensors)
    lines = [
        *(_missing(name, expected[name], users[name]) + _nearest(name, extra) for name in missing[:_SHOWN]),
        *(_left_over(name, found[name]) + _nearest(name, missing) for name in extra[:_SHOWN]),
    ]
    wrong = [*_misshaped(users, expected, found), *_mixed_dtypes(tensors, found)]
    total = len(missing) + len(extra) + len(wrong)
    if not total:
        return
    shown = (lines + wrong)[:_SHOWN]
    more = [f"and {total - len(shown)} more"] if total > len(shown) else []
    title = f"the checkpoint does not fit the table of {family} ({total} fault{'s' if total > 1 else ''})"
    raise ConversionError("\n  ".join([title, *shown, *more]))


def _users(tensors: Sequence[Mapped]) -> dict[str, Mapped]:
    """The first megatron-core tensor that uses each Hugging Face tensor."""
    users: dict[str, Mapped] = {}
    for mapped in tensors:
        for piece in mapped.pieces:
            users.setdefault(piece.hf, mapped)
    return users


def _missing(name: str, shape: tuple[int, ...], user: Mapped) -> str:
    return f"{name} {list(shape)} is missing: {user.entry} needs it for {_title(user)} {list(user.shape)}"


def _left_over(name: str, info: TensorInfo) -> str:
    return f"{name} {list(info.shape)} {info.dtype} is left over: no entry of the table uses it"


def _nearest(name: str, names: Sequence[str]) -> str:
    """The nearest name among those without a partner on the other side."""
    near = get_close_matches(name, names[:2000], n=1, cutoff=0.8)
    return f"; nearest without a partner: {near[0]}" if near else ""


def _misshaped(
    users: Mapping[str, Mapped], expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo]
) -> list[str]:
    return [
        f"{name} has shape {list(found[name].shape)} {found[name].dtype}, config.json gives {list(shape)} "
        f"for {_title(users[name])} {list(users[name].shape)}: {users[name].entry}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]


def _mixed_dtypes(tensors: Sequence[Mapped], found: Mapping[str, TensorInfo]) -> list[str]:
    faults = []
    for mapped in tensors:
        first = next(mapped.pieces)
        for piece in _one_per_name(mapped):
            if piece.hf not in found:
                continue
            dtype = found[piece.hf].dtype
            if dtype not in FLOATS:
                faults.append(
                    f"{piece.hf} {list(found[piece.hf].shape)} is {dtype}, entry {mapped.entry} moves "
                    f"{', '.join(FLOATS)} only; dequantise the checkpoint first"
                )
            elif first.hf in found and found[first.hf].dtype in FLOATS and dtype != found[first.hf].dtype:
                faults.append(
                    f"{piece.hf} is {dtype} and {first.hf} is {found[first.hf].dtype}: "
                    f"{_title(mapped)} {list(mapped.shape)} needs one dtype, entry {mapped.entry}"
                )
    return faults


def _one_per_name(mapped: Mapped) -> list[Piece]:
    return list({piece.hf: piece for piece in mapped.pieces}.values())


def _title(mapped: Mapped) -> str:
    return mapped.name if mapped.expert is None else f"{mapped.name} of expert {mapped.expert}"
