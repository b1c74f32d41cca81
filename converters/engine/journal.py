"""Which tensors of a plan are on disk: lines that are written after the bytes they speak of were synced.

A staged conversion is a folder beside the output, `.NAME.partial/`: `files/` becomes the output, `journal/` has one
file per rank, whose first line names the plan and the Slurm step that started the rank. A tensor's number in any of
them means that its bytes are safe on disk, whatever happens to processes or machines.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from megabatch.converters.atomic import replacing, sync_folder
from megabatch.converters.engine.plan import Plan
from megabatch.errors import ConversionError


class Place(NamedTuple):
    """One process among those that share the work."""

    rank: int = 0
    world: int = 1
    start: str = ""
    """The Slurm step that started all of them; empty if they were started by hand."""


ALONE = Place()


class _Noted(NamedTuple):
    """One rank's file."""

    rank: int
    plan: str
    start: str
    lines: list[str]


class Staged:
    """The names inside `.NAME.partial/`, and what it says of its state."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f".{output.name}.partial")
        self.files = self.folder / "files"
        self.journals = self.folder / "journal"
        self._number = self.journals / "number"

    def done(self, plan: Plan) -> dict[int, str]:
        """Numbers of the tensors that are on disk, each with the digest of its bytes if it was verified."""
        found: dict[int, str] = {}
        for noted in self._read():
            if noted.plan == plan.digest:
                for line in noted.lines:
                    number, _, hashed = line.partition(" ")
                    if hashed or int(number) not in found:
                        found[int(number)] = hashed
        return found

    def _read(self) -> Iterable[_Noted]:
        for path in sorted(self.journals.glob("rank_*")):
            lines = path.read_text(encoding="ascii").split("\n")[:-1]  # a last line without its end was cut off
            if lines and lines[0].startswith("plan "):
                _, digest, *start = lines[0].split(" ")
                yield _Noted(int(path.name.removeprefix("rank_")), digest, " ".join(start), lines[1:])

    def open(self, plan: Plan, place: Place, *, resume: bool) -> None:
        """Makes the folders, or continues those of the same plan: anyone's with `resume`, else only those of ranks
        that were started with this one, and only if this rank has no file yet.

        Raises: ConversionError for leftovers that must not be touched.
        """
        found = list(self._read())
        plans = {noted.plan for noted in found}
        if self.folder.exists():
            if plans - {plan.digest} or (not plans and self._has_files()):
                raise ConversionError(
                    f"{self.folder}: left by a conversion of another source or with other flags; finish that one "
                    "with its own command and --resume, or remove the folder"
                )
            if not resume and any(
                place.world == 1 or noted.rank == place.rank or noted.start != place.start for noted in found
            ):
                raise ConversionError(
                    f"{self.folder}: left by an interrupted conversion of the same source ({self._progress(plan)}); "
                    "add --resume to finish it, or remove the folder"
                )
        self.files.mkdir(parents=True, exist_ok=True)
        self.journals.mkdir(exist_ok=True)

    def _has_files(self) -> bool:
        """Whether there is anything but folders and journals: those come first, so without a plan it is not ours."""
        return any(path for path in self.folder.rglob("*") if path.parent != self.journals and not path.is_dir())

    def _progress(self, plan: Plan) -> str:
        done = self.done(plan)
        return f"{sum(plan.tensors[number].total for number in done)} of {plan.tensor_file_bytes} bytes are done"

    def remove(self) -> None:
        """Removes all of it, after the output has its final name."""
        shutil.rmtree(self.files, ignore_errors=True)  # before what `named` goes by
        shutil.rmtree(self.folder, ignore_errors=True)

    def note(self) -> None:
        """Records which folder is about to become the output."""
        with replacing(self._number) as file:
            file.write(str(self.files.stat().st_ino).encode())

    def named(self) -> bool:
        """Whether a rank has renamed the output: the recorded folder is the output, or nothing is staged any more.

        A manifest cannot tell: a replaced output may have the same plan.
        """
        try:
            return int(self._number.read_text(encoding="ascii")) == self.output.stat().st_ino
        except FileNotFoundError:
            return not self.files.exists()


class Journal:
    """One rank's file, appended to."""

    def __init__(self, staged: Staged, plan: Plan, place: Place) -> None:
        path = staged.journals / f"rank_{place.rank:05d}"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole != len(raw):
            os.ftruncate(self._file, whole)
        if not whole:
            self._append(f"plan {plan.digest} {place.start}\n")
            sync_folder(path.parent)

    def add(self, numbers: Iterable[int], hashes: dict[int, str] | None = None) -> None:
        """Records tensors whose bytes are synced."""
        known = hashes or {}
        text = "".join(f"{number} {known[number]}\n" if number in known else f"{number}\n" for number in numbers)
        if text:
            self._append(text)

    def _append(self, text: str) -> None:
        view = text.encode("ascii")
        while view:
            view = view[os.write(self._file, view) :]
        os.fsync(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
