"""torch.save's container, an uncompressed zip, around one tensor: written with sizes known up front, and opened.

Layout of PyTorch's archive: `archive/data.pkl` (the tensor's pickle), `archive/byteorder`, `archive/data/0` (the raw
bytes, aligned to 64), `archive/version`.
"""

from __future__ import annotations

import functools
import struct
import zlib

from megabatch.converters.mapping import elements
from megabatch.converters.safetensors_io.header import ITEMSIZE
from megabatch.converters.torch_dist.pickle_codec import Call, Global, Persistent, dump, load
from megabatch.converters.torch_dist.zip_directory import ZipDirectory
from megabatch.errors import ConversionError
from megabatch.values import dataclass

STORAGES = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage", "F64": "DoubleStorage"}
"""torch's storage class for each of safetensors' dtypes."""
_DTYPES = {storage: dtype for dtype, storage in STORAGES.items()}
_LIMIT = 0xFFFFFFFF
_ALIGN = 64
_LOCAL, _CENTRAL = struct.Struct("<IHHHHHIIIHH"), struct.Struct("<IHHHHHHIIIHHHHHII")


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major tensor, in elements."""
    strides: list[int] = []
    step = 1
    for dim in reversed(shape):
        strides.insert(0, step)
        step *= dim
    return tuple(strides)


def tensor_record(storage: str, shape: tuple[int, ...], count: int) -> Call:
    """What torch pickles for a contiguous tensor with `count` elements on the CPU."""
    key = Persistent(("storage", Global("torch", storage), "0", "cpu", count))
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (key, 0, shape, contiguous_strides(shape), False, hooks))


@dataclass(frozen=True, slots=True)
class _Member:
    name: bytes
    offset: int
    size: int
    crc: int


class Archive:
    """The bytes around one tensor's data: `prefix(crc)`, then `size` bytes of data, then `suffix(crc)`."""

    def __init__(self, pickled: bytes, size: int) -> None:
        self.size = size
        self._head = bytearray()
        self._members: list[_Member] = []
        for name, data in ((b"data.pkl", pickled), (b"byteorder", b"little")):
            self._open_member(b"archive/" + name, len(data), zlib.crc32(data))
            self._head += data
        self._crc_at = len(self._head) + 14
        self._open_member(b"archive/data/0", size, 0)
        self.data_offset = len(self._head)
        self.total = self.data_offset + size + len(self.suffix(0))

    @staticmethod
    def of_tensor(dtype: str, shape: tuple[int, ...], *, count: int, size: int) -> Archive:
        """The archive that torch.save makes of a tensor with `count` elements in `size` bytes."""
        return Archive(dump(tensor_record(STORAGES[dtype], shape, count)), size)

    def _open_member(self, name: bytes, size: int, crc: int) -> None:
        """Appends a local header whose padding puts the data on an aligned byte."""
        offset = len(self._head)
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LIMIT else b""
        shown = _LIMIT if large else size
        pad = -(offset + _LOCAL.size + len(name) + len(large) + 4) % _ALIGN
        extra = large + struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        fields = (0x04034B50, 45 if large else 0, 0, 0, 0, 0, crc, shown, shown, len(name), len(extra))
        self._head += _LOCAL.pack(*fields) + name + extra
        self._members.append(_Member(name, offset, size, crc))

    def prefix(self, crc: int) -> bytes:
        """Everything before the data, given its CRC-32."""
        head = bytearray(self._head)
        head[self._crc_at : self._crc_at + 4] = struct.pack("<I", crc)
        return bytes(head)

    def suffix(self, crc: int) -> bytes:
        """Everything after the data: the version and the central directory."""
        start = self.data_offset + self.size
        name, version = b"archive/version", b"3\n"
        fields = (0x04034B50, 0, 0, 0, 0, 0, zlib.crc32(version), len(version), len(version), len(name), 0)
        out = bytearray(_LOCAL.pack(*fields) + name + version)
        data = self._members[-1]
        members = [
            *self._members[:-1],
            _Member(data.name, data.offset, data.size, crc),
            _Member(name, start, len(version), zlib.crc32(version)),
        ]
        directory = start + len(out)
        for member in members:
            out += _central_entry(member)
        out += _end(len(members), directory, start + len(out))
        return bytes(out)


def _central_entry(member: _Member) -> bytes:
    values = [value for value in (member.size, member.size, member.offset) if value >= _LIMIT]
    large = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    size, offset = min(member.size, _LIMIT), min(member.offset, _LIMIT)
    needed = 45 if large else 0
    fields = (0x02014B50, 0, needed, 0, 0, 0, 0, member.crc, size, size, len(member.name), len(large), 0, 0, 0, 0)
    return _CENTRAL.pack(*fields, offset) + member.name + large


def _end(count: int, directory: int, end: int) -> bytes:
    """The end of central directory, with zip64's record and locator where the offset needs them."""
    large = b""
    if directory >= _LIMIT:
        large = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, end - directory, directory)
        large += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    shown = min(directory, _LIMIT)
    return large + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, end - directory, shown, 0)


@functools.cache
def archive_of(dtype: str, shape: tuple[int, ...]) -> Archive:
    """The archive of a contiguous tensor that is all of its storage; many tensors share one."""
    count = elements(shape)
    return Archive.of_tensor(dtype, shape, count=count, size=count * ITEMSIZE[dtype])


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A contiguous tensor inside an archive."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte of its data in the archive."""


def open_tensor(file: int, start: int, length: int, *, place: str) -> StoredTensor:
    """Finds the tensor in the archive in `length` bytes of a file from `start` on.

    Raises: ConversionError naming `place`.
    """
    try:
        archive = ZipDirectory(file, start, length)
        root = next(iter(archive.members)).split("/")[0]
        order = f"{root}/byteorder"
        if order in archive.members and archive.read(order) != b"little":
            raise ValueError("it was saved on a big-endian machine")
        dtype, skip, shape, key = _described(archive.read(f"{root}/data.pkl"))
        needed, size = (skip + elements(shape)) * ITEMSIZE[dtype], archive.members[f"{root}/data/{key}"].size
        if skip < 0 or needed > size:
            raise ValueError(f"{shape} {dtype} does not fit its storage of {size} bytes")
        offset = archive.data_offset(f"{root}/data/{key}") + skip * ITEMSIZE[dtype]
        if offset + elements(shape) * ITEMSIZE[dtype] > length:
            raise ValueError("its data ends behind it")
        return StoredTensor(dtype, shape, offset)
    except ConversionError as error:
        raise ConversionError(f"{place}: {error}") from error
    except (struct.error, KeyError, ValueError, AttributeError, StopIteration, TypeError, OSError) as error:
        raise ConversionError(f"{place}: not a tensor saved by torch.save: {type(error).__name__} {error}") from error


@functools.lru_cache(1 << 12)
def _described(pickled: bytes) -> tuple[str, int, tuple[int, ...], str]:
    """dtype, elements to skip, shape and the storage's name; chunks of equal shape have equal pickles.

    Raises: ValueError, or what else a broken pickle leads to.
    """
    record = load(pickled, place="data.pkl")
    if type(record).__name__ != "_rebuild_tensor_v2":
        raise ValueError(f"{type(record).__name__} is not a plain tensor")
    storage, skip, shape, strides = record.args[:4]
    _, kind, key, *_ = storage.key
    if type(skip) is not int:
        raise ValueError(f"an offset of {skip!r}")
    check_contiguous(tuple(shape), tuple(strides))
    return _DTYPES[kind.__name__], skip, tuple(shape), str(key)


def check_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Raises: ValueError for a shape that cannot be, and for numbers that do not lie in order without gaps."""
    if len(shape) > 16 or any(not isinstance(dim, int) or not 0 <= dim < 1 << 48 for dim in shape):
        raise ValueError(f"impossible shape {shape}")
    usual = contiguous_strides(shape)
    if any(dim > 1 and a != b for dim, a, b in zip(shape, strides, usual, strict=True)):
        raise ValueError(f"the tensor is not contiguous: shape {shape}, strides {strides}")
