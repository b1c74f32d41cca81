"""Adapters added to weights: `W + scale * B @ A` in float32, a tile at a time.

The rounding of a product depends on the shapes passed to the linear algebra library, and on how many threads it uses.
So our shapes depend only on the tensor, and each product is small enough that the library keeps it in one thread: any
number of workers, ranks and resumptions gives the same bytes on processors of one kind.
"""

from __future__ import annotations

from typing import Any

from megabatch.converters.engine.compute import Computer, numpy
from megabatch.converters.engine.gather import matrix_bytes
from megabatch.converters.engine.plan import Matrix, Tensor
from megabatch.converters.engine.sources import Sources
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.errors import ConversionError

_TILE = 1 << 16
"""Elements whose arrays stay in a processor's cache."""
_LEAST_ROWS = 8
"""Rows of a tile: with fewer, reading the right matrix would cost more than the product."""
_LARGEST = {"F16": 65504.0, "F32": 3.4e38}
_PRODUCT = 1 << 18
"""Multiplications in one call; OpenBLAS divides larger ones among threads."""


class Merger:
    """One worker's arrays, and the matrices of the tensor in its hands."""

    def __init__(self, computer: Computer, sources: Sources) -> None:
        self._np = numpy()
        self._computer, self._sources = computer, sources
        self._tensor: Tensor | None = None
        self._factors: list[tuple[Any, Any]] = []
        self._held: dict[Matrix, Any] = {}
        self._made = memoryview(bytearray())
        self._product = self._np.empty(0, self._np.float32)
        self._largest, self._may_overflow = 0.0, False

    def add(self, raw: memoryview, tensor: Tensor, first: int, *, source_dtype: str) -> memoryview:
        """The tensor's rows from `first` on, of which `raw` has the values without adapters; the next call reuses
        the memory."""
        self._hold(tensor)
        columns = tensor.row_bytes // ITEMSIZE[tensor.dtype]
        size = raw.nbytes // ITEMSIZE[source_dtype] * ITEMSIZE[tensor.dtype]
        if size > self._made.nbytes:
            self._made = memoryview(bytearray(size))
        out = self._made[:size]
        rows = max(_LEAST_ROWS, _TILE // columns)

        def change(values: Any, start: int) -> None:
            if tensor.add:
                values += self._np.float32(tensor.add)
            self._add(tensor, values.reshape(-1, columns), first + start // columns)
            if self._may_overflow and not (abs(values) <= self._largest).all():
                raise ConversionError(
                    f"{tensor.name} {list(tensor.shape)}: with its adapters it has numbers beyond {tensor.dtype}'s "
                    f"largest, {self._largest:g}"
                )

        self._computer.change(raw, source_dtype, tensor.dtype, count=rows * columns, by=change, out=out)
        return out

    def _add(self, tensor: Tensor, grid: Any, top: int) -> None:
        for term, (left, right) in zip(tensor.low_rank, self._factors, strict=True):
            start, stop = max(top, term.row), min(top + len(grid), term.row + term.rows)
            if start < stop:
                self._multiply(grid[start - top : stop - top], left[start - term.row : stop - term.row], right)

    def _multiply(self, grid: Any, left: Any, right: Any) -> None:
        """grid += left @ right."""
        np, (rank, columns) = self._np, right.shape
        if len(left) == 1:  # else it would be a product of another kind, divided among threads
            left = np.concatenate([left, np.zeros_like(left)])
        if len(left) * columns > len(self._product):
            self._product = np.empty(len(left) * columns, np.float32)
        product = self._product[: len(left) * columns].reshape(len(left), columns)
        parts = -(-product.size * rank // _PRODUCT)
        for part in range(parts):
            columns_of = slice(columns * part // parts, columns * (part + 1) // parts)
            np.matmul(left, right[:, columns_of], out=product[:, columns_of])
        grid += product[: len(grid)]

    def _hold(self, tensor: Tensor) -> None:
        """Loads the matrices; neighbours (experts) often share them, so those of the tensor before are kept."""
        if tensor is self._tensor:
            return
        before, self._held = self._held, {}
        factors = []
        self._largest = _LARGEST.get(tensor.dtype, _LARGEST["F32"])
        bound = 0.0
        for term in tensor.low_rank:
            left, right = (self._loaded(matrix, before) for matrix in (term.left, term.right))
            rows = left[term.first :: term.every][: term.rows]
            factors.append((rows * self._np.float32(term.scale), right))
            bound += len(right) * float(abs(rows).max(initial=0)) * float(abs(right).max(initial=0)) * abs(term.scale)
        self._factors, self._tensor = factors, tensor
        self._may_overflow = tensor.dtype == "F16" or bound > self._largest / 2

    def _loaded(self, matrix: Matrix, before: dict[Matrix, Any]) -> Any:
        """float32, contiguous, as it is meant."""
        whole = matrix._replace(pick=None, transposed=False)
        if whole not in self._held:
            self._held[whole] = before[whole] if whole in before else self._read(whole)
        values = self._held[whole]
        if matrix.pick is not None:
            values = values[:, slice(*matrix.pick)]
        return self._np.ascontiguousarray(values.T if matrix.transposed else values)

    def _read(self, matrix: Matrix) -> Any:
        made = bytearray(4 * matrix.rows * matrix.columns)
        raw = matrix_bytes(self._sources, matrix)
        self._computer.cast(memoryview(raw), matrix.dtype, "F32", out=memoryview(made))
        return self._np.frombuffer(made, "<f4").reshape(matrix.rows, matrix.columns)
