"""Headers, indices, metadata and archives with changed bytes: an error each time, or the right output."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from made_folders import contents

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.conversion import make_plan
from megabatch.errors import ConversionError

SEED = os.environ.get("MUTATION_SEED", "1")
Mutation = Callable[[bytes, random.Random], bytes]


def flipped(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]


def shortened(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + raw[at + rng.randrange(1, 9) :]


def lengthened(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:]


def copied(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes twice: keys, entries and members that occur again."""
    at, size = rng.randrange(len(raw)), rng.randrange(8, 200)
    return raw[: at + size] + raw[at:]


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


MUTATIONS: tuple[Mutation, ...] = (flipped, flipped, flipped, shortened, lengthened, copied, cut)


def place(folder: Path, name: str, hf: Path) -> tuple[Path, int, int]:
    """File and range of the bytes to change."""
    if name == "header":
        path = sorted(folder.glob("*.safetensors"))[1]
        return path, 0, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    if name.startswith("archive"):
        plan = make_plan(ConversionRequest(to_mcore=True, model=hf))
        tensor, path = plan.tensors[1], folder / plan.files[0].name
        end = tensor.data_offset + tensor.data_bytes
        head = (tensor.offset, tensor.data_offset)
        return path, *(head if name == "archive's head" else (end, tensor.offset + tensor.total))
    return folder / name, 0, (folder / name).stat().st_size


@pytest.fixture(scope="module")
def mcore(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "mcore"
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=folder)
    return folder


@pytest.mark.parametrize("name", ["header", "model.safetensors.index.json"])
def test_mutated_hugging_face_folders(name: str, hf: Path, mcore: Path, tmp_path: Path) -> None:
    check(name, hf, mcore, tmp_path, way="to_mcore", times=100)


@pytest.mark.parametrize("name", ["release/.metadata", "archive's head", "archive's tail", "release/metadata.json"])
def test_mutated_checkpoints(name: str, hf: Path, mcore: Path, tmp_path: Path) -> None:
    convert(ConversionRequest(to_hf=True, mcore_model=mcore), output_dir=tmp_path / "expected")
    check(name, mcore, tmp_path / "expected", tmp_path, way="to_hf", times=100)


def check(name: str, source: Path, whole: Path, tmp_path: Path, *, way: str, times: int) -> None:
    rng, expected = random.Random(f"{name} {SEED}"), tensor_files(whole)
    shutil.copytree(source, tmp_path / "source")
    path, start, stop = place(tmp_path / "source", name, source if way == "to_mcore" else whole)
    original = path.read_bytes()
    refused = 0
    for attempt in range(times):
        mutated = rng.choice(MUTATIONS)(original[start:stop], rng)
        path.write_bytes(original[:start] + mutated + original[stop:])
        out = tmp_path / "out" / str(attempt)
        given = {"model": tmp_path / "source"} if way == "to_mcore" else {"mcore_model": tmp_path / "source"}
        try:
            convert(ConversionRequest(to_mcore=way == "to_mcore", to_hf=way == "to_hf", **given), output_dir=out)  # type: ignore[arg-type]
            assert tensor_files(out) == expected, (attempt, mutated)
            shutil.rmtree(out)
        except ConversionError as error:
            refused += 1
            assert str(error)
            assert not out.exists()
    assert refused > times / 3, refused


def tensor_files(folder: Path) -> dict[str, bytes]:
    """Everything but the manifest, which names the source's plan."""
    return {name: data for name, data in contents(folder).items() if not name.startswith("megabatch-")}
