"""Corrupt, incomplete and unfit checkpoints, archives beyond 4 GB, and pickles that must not run."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabatch.converters.to_hf import to_hf
from megabatch.converters.to_mcore import to_mcore
from megabatch.converters.torch_dist.archive import Archive
from megabatch.converters.torch_dist.folder import TorchDistFolder
from megabatch.converters.torch_dist.metadata import Chunk, Entry, Stored, dump_metadata
from megabatch.converters.torch_dist.pickle_codec import Call, Global, Instance, Recorded, dump, load
from megabatch.errors import ConversionError

Saved = Callable[[str], Path]


@pytest.fixture
def checkpoint(saved: Saved, tmp_path: Path) -> Path:
    to_mcore(saved("qwen3-moe"), tmp_path / "mcore")
    return tmp_path / "mcore"


def rewrite(checkpoint: Path, change: Callable[[dict[str, Entry]], object]) -> None:
    """Changes what `.metadata` says of the tensors."""
    folder = TorchDistFolder(checkpoint)
    for key, entry in folder.entries.items():
        entry.dtype = folder.dtype(key)
    change(folder.entries)
    (checkpoint / ".metadata").write_bytes(dump_metadata(folder.entries, [], save_id="x"))


def test_pickles_name_classes_and_call_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    made = load(pickle.dumps([Evil(), {"a": 1}]), place="test")
    assert made[1] == {"a": 1}
    assert isinstance(made[0], Recorded)
    assert made[0].args == (str(tmp_path / "made"),)
    assert not (tmp_path / "made").exists()


def test_pickles_read_back_what_was_written() -> None:
    value = {"a": (1, -5, 300, 1 << 40, True, None, 2.5), "b": [Call(Global("torch", "Size"), ((2, 3),))], "é": ()}
    back = load(dump(value), place="test")
    assert back["a"] == value["a"]
    assert (type(back["b"][0]).__name__, back["b"][0].module, back["b"][0].args) == ("Size", "torch", ((2, 3),))
    assert load(dump(Instance(Global("m", "C"), {"x": 1})), place="test").field("x") == 1


@pytest.mark.parametrize("raw", [b"", b"\x80\x02", b"N", b"r\xff\xff\xff\xff.", b"\x80\x02}q\x00(X\x04\x00"])
def test_broken_pickles(raw: bytes) -> None:
    with pytest.raises(ConversionError, match="here: not a valid pickle"):
        load(raw, place="here")


def test_torch_reads_our_archives_and_we_read_torch(tmp_path: Path) -> None:
    data = torch.arange(35, dtype=torch.bfloat16).view(5, 7)
    raw = data.view(torch.uint8).numpy().tobytes()
    archive = Archive.of_tensor("BF16", (5, 7), count=35, size=len(raw))
    (tmp_path / "a").write_bytes(archive.prefix(0) + raw + archive.suffix(0))
    assert archive.total == (tmp_path / "a").stat().st_size
    assert torch.equal(torch.load(tmp_path / "a", weights_only=True), data)


def test_archives_beyond_four_gigabytes(tmp_path: Path) -> None:
    count = (1 << 30) + 5
    archive = Archive.of_tensor("F32", (count,), count=count, size=4 * count)
    last = torch.tensor([42.0]).numpy().tobytes()
    with open(tmp_path / "big", "wb") as file:
        file.write(archive.prefix(0))
        file.seek(archive.data_offset + 4 * count - 4)
        file.write(last + archive.suffix(0))
    assert (tmp_path / "big").stat().st_size == archive.total
    with zipfile.ZipFile(tmp_path / "big") as opened:
        assert opened.getinfo("archive/data/0").file_size == 4 * count
    tensor = torch.load(tmp_path / "big", weights_only=True, mmap=True)
    assert (tensor.numel(), tensor[-1].item(), tensor[0].item()) == (count, 42.0, 0.0)
    os.remove(tmp_path / "big")


def test_left_over_missing_and_misshaped_tensors_are_named(checkpoint: Path, saved: Saved, tmp_path: Path) -> None:
    def change(entries: dict[str, Entry]) -> None:
        entries["decoder.layers.mlp.shared.weight"] = entries.pop("decoder.layers.mlp.router.weight")
        entries["optimizer.state.exp_avg.x"] = Entry((24,), [], "F32")
        entries["output_layer.weight"].size = (59, 24)

    rewrite(checkpoint, change)
    with pytest.raises(ConversionError) as caught:
        to_hf(checkpoint, saved("qwen3-moe"), tmp_path / "hf")
    text = str(caught.value)
    assert "decoder.layers.mlp.router.weight [2, 4, 24] is missing" in text
    assert "decoder.layers.mlp.shared.weight [2, 4, 24] is left over" in text
    assert "output_layer.weight has shape [59, 24], config.json gives [60, 24]" in text
    assert "optimizer" not in text
    assert not (tmp_path / "hf").exists()


def hole(chunks: list[Chunk]) -> list[Chunk]:
    return chunks[:1]


def overlap(chunks: list[Chunk]) -> list[Chunk]:
    """The second chunk's bytes as rows of the first layer, one further down."""
    return [chunks[0], replace(chunks[1], offsets=(0, 1, 0), sizes=(1, 3, 24))]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (hole, r"weight \[1\]: chunks leave a gap in rows 0 to 4"),
        (overlap, r"__0_.\.distcp: .*router.weight at byte \d+: shape \[1, 4, 24\], .metadata gives \[1, 3, 24\]"),
        (lambda chunks: [*chunks, chunks[0]], r"router.weight has its chunk at \[0, 0, 0\] in two places"),
    ],
)
def test_holes_and_overlaps_leave_no_loadable_folder(
    change: Callable[[list[Chunk]], list[Chunk]], fault: str, checkpoint: Path, saved: Saved, tmp_path: Path
) -> None:
    def changed(entries: dict[str, Entry]) -> None:
        entry = entries["decoder.layers.mlp.router.weight"]
        entry.chunks = change(entry.chunks)

    rewrite(checkpoint, changed)
    with pytest.raises(ConversionError, match=fault):
        to_hf(checkpoint, saved("qwen3-moe"), tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == ["mcore"]


def described_twice(metadata: Any) -> None:
    metadata.state_dict_metadata[ROUTER].chunks.append(metadata.state_dict_metadata[ROUTER].chunks[0])


def described_no_more(metadata: Any) -> None:
    metadata.state_dict_metadata[ROUTER].chunks.pop()


def located_no_more(metadata: Any) -> None:
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == ROUTER)]


def of_another_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata[ROUTER].properties.dtype = torch.bfloat16


def no_floats(metadata: Any) -> None:
    metadata.state_dict_metadata[ROUTER].properties.dtype = torch.int32


def far_away(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = 1 << 63


def very_long(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).length = 1 << 64


def nameless(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "a\0b"


def folder_for_a_file(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = ".."


ROUTER = "decoder.layers.mlp.router.weight"
CONTRADICTIONS: list[tuple[Callable[[Any], None], str]] = [
    (described_twice, r"\.metadata: .*router.weight: the chunk at \[0, 0, 0\] of \[1, 4, 24\] is described twice"),
    (described_no_more, r"\.metadata: .*router.weight: the chunk at \[1, 0, 0\], in __0_\d.distcp, is not described"),
    (located_no_more, r"\.metadata: .*router.weight: the chunk at \[0, 0, 0\] of \[1, 4, 24\] is in no file"),
    (of_another_dtype, r"distcp: .*router.weight at byte \d+: is F32, .metadata gives BF16"),
    (no_floats, r"distcp: .*router.weight at byte \d+: is F32, .metadata gives int32"),
    (far_away, r"\.metadata: not checkpoint metadata: \d+ bytes at 9223372036854775808 of __0_0.distcp cannot be"),
    (very_long, r"\.metadata: not checkpoint metadata: 18446744073709551616 bytes at"),
    (nameless, r"\.metadata: not checkpoint metadata: 'a\\x00b' is not a file of this folder"),
    (folder_for_a_file, r"\.\.: cannot be read: it is a folder, not a regular file"),
]


@pytest.mark.parametrize(("change", "fault"), CONTRADICTIONS)
def test_metadata_that_contradicts_itself_or_its_archives(
    change: Callable[[Any], None], fault: str, checkpoint: Path, saved: Saved, tmp_path: Path
) -> None:
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConversionError, match=fault):
        to_hf(checkpoint, saved("qwen3-moe"), tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == ["mcore"]


def test_files_that_are_missing_truncated_or_foreign(checkpoint: Path, saved: Saved, tmp_path: Path) -> None:
    reference = saved("qwen3-moe")
    with pytest.raises(ConversionError, match=r"holds no checkpoint; it has config\.json"):
        to_hf(reference, reference, tmp_path / "hf")
    os.truncate(checkpoint / "__0_1.distcp", 3000)
    with pytest.raises(ConversionError, match=r"__0_1\.distcp"):
        to_hf(checkpoint, reference, tmp_path / "hf")
    os.remove(checkpoint / "__0_1.distcp")
    with pytest.raises(ConversionError, match=r"__0_1\.distcp: cannot be read: No such file"):
        to_hf(checkpoint, reference, tmp_path / "hf2")
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ConversionError, match="zarr"):
        to_hf(checkpoint, reference, tmp_path / "hf3")


def test_outputs_that_exist_are_left_alone(checkpoint: Path, saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="exists and is not empty"):
        to_mcore(saved("qwen3-moe"), checkpoint)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        to_hf(checkpoint, saved("qwen3-moe"), tmp_path / "hf")


def test_a_failed_conversion_is_no_checkpoint(saved: Saved, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved("qwen3"), source)
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1)
    with pytest.raises(ConversionError, match="truncated"):
        to_mcore(source, tmp_path / "mcore")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("way", ["to_mcore", "to_hf"])
def test_a_full_disk_is_named_and_leaves_nothing(way: str, checkpoint: Path, saved: Saved, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        with pytest.raises(ConversionError, match=r"disk full.* bytes are needed"):
            if way == "to_mcore":
                to_mcore(saved("qwen3-moe"), disk / "out")
            else:
                to_hf(checkpoint, saved("qwen3-moe"), disk / "out")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_metadata_of_torch_itself_is_read(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {"a": torch.randn(6, 5), "b": torch.randn(3).bfloat16(), "note": "text"}
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    (tmp_path / "dcp" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    folder = TorchDistFolder(tmp_path / "dcp")
    assert {key: (entry.size, folder.dtype(key)) for key, entry in folder.entries.items()} == {
        "a": ((6, 5), "F32"),
        "b": ((3,), "BF16"),
    }
    (block,) = folder.blocks("a", ())
    assert (block.rows, block.cols) == ((0, 6), (0, 5))
    assert block.path.read_bytes()[block.offset :][:120] == state["a"].numpy().tobytes()


def test_our_metadata_is_read_by_torch(tmp_path: Path) -> None:
    entry = Entry((4, 2), [Chunk((0, 0), (4, 2), Stored("f", 3, 99))], "BF16")
    raw = dump_metadata({"w": entry}, [("state", Stored("f", 0, 3))], save_id="id")
    made = pickle.loads(raw)
    tensor = made.state_dict_metadata["w"]
    assert (tensor.size, tensor.properties.dtype) == (torch.Size([4, 2]), torch.bfloat16)
    assert tensor.chunks[0].sizes == torch.Size([4, 2])
    assert {index.fqn: (info.offset, info.length) for index, info in made.storage_data.items()} == {
        "w": (3, 99),
        "state": (0, 3),
    }


def test_mutated_metadata_is_an_error_or_changes_nothing(checkpoint: Path, saved: Saved, tmp_path: Path) -> None:
    original = (checkpoint / ".metadata").read_bytes()
    expected = load_file(saved("qwen3-moe") / "model.safetensors")
    rng = random.Random(11)
    refused = 0
    for attempt in range(120):
        at = rng.randrange(len(original))
        cut = original[at + rng.randrange(2) :] if attempt % 2 else original[at + 1 :]
        (checkpoint / ".metadata").write_bytes(original[:at] + rng.randbytes(1) * (attempt % 3 > 0) + cut)
        out = tmp_path / str(attempt)
        try:
            to_hf(checkpoint, saved("qwen3-moe"), out)
            back = load_file(out / "model.safetensors")
            assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())
        except ConversionError:
            refused += 1
            assert not out.exists()
    assert refused > 60
