"""Outputs that differ from their source, or from their manifest, in any byte."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from made_folders import contents

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.conversion import compare_output, make_plan, verify_output
from megabatch.converters.engine.execute import share
from megabatch.errors import ConversionError


@pytest.fixture(scope="module")
def verified(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified") / "mcore"
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=folder, verify=True)
    return folder


@pytest.fixture(scope="module")
def back(verified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified") / "hf"
    convert(
        ConversionRequest(to_hf=True, mcore_model=verified, max_shard_size="100KB"), output_dir=folder, verify=True
    )
    return folder


def test_a_good_output_passes(hf: Path, verified: Path, back: Path) -> None:
    assert verify_output(verified) > 400_000
    assert verify_output(back) > 400_000
    compare_output(make_plan(ConversionRequest(to_mcore=True, model=hf)), verified)
    compare_output(make_plan(ConversionRequest(to_hf=True, mcore_model=verified, max_shard_size="100KB")), back)


@pytest.mark.parametrize("way", ["to_mcore", "to_hf"])
def test_any_changed_byte_is_found_and_its_tensor_named(
    way: str, hf: Path, verified: Path, back: Path, tmp_path: Path
) -> None:
    whole = {"to_mcore": verified, "to_hf": back}[way]
    plan = (
        make_plan(ConversionRequest(to_mcore=True, model=hf))
        if way == "to_mcore"
        else make_plan(ConversionRequest(to_hf=True, mcore_model=verified, max_shard_size="100KB"))
    )
    shutil.copytree(whole, tmp_path / "out")
    rng = random.Random(3)
    for _ in range(60):
        tensor = rng.choice(plan.tensors)
        path = tmp_path / "out" / plan.files[tensor.file].name
        at = tensor.offset + rng.randrange(tensor.total)
        raw = path.read_bytes()
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        with pytest.raises(ConversionError) as caught:
            compare_output(plan, tmp_path / "out")
        assert f"{path}: {tensor.name} " in str(caught.value)
        with pytest.raises(ConversionError) as caught:
            verify_output(tmp_path / "out")
        assert f"{path}: {tensor.name} is damaged" in str(caught.value)
        path.write_bytes(raw)
    verify_output(tmp_path / "out")


def test_headers_sizes_and_missing_files_are_compared(verified: Path, back: Path, tmp_path: Path) -> None:
    plan = make_plan(ConversionRequest(to_hf=True, mcore_model=verified, max_shard_size="100KB"))
    shutil.copytree(back, tmp_path / "out")
    path = tmp_path / "out" / plan.files[1].name
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"format":"pt"', b'"format":"np"'))
    with pytest.raises(ConversionError, match="its header is not the plan's"):
        compare_output(plan, tmp_path / "out")
    with pytest.raises(ConversionError, match="header is damaged"):
        verify_output(tmp_path / "out")
    path.write_bytes(raw[:-1])
    with pytest.raises(ConversionError, match="bytes, the plan gives"):
        compare_output(plan, tmp_path / "out")
    with pytest.raises(ConversionError, match="bytes, its manifest gives"):
        verify_output(tmp_path / "out")
    path.write_bytes(raw)
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00001-of", "00002-of", 1))
    with pytest.raises(ConversionError, match=r"index\.json: is missing or differs from the plan"):
        compare_output(plan, tmp_path / "out")
    with pytest.raises(ConversionError, match=r"index\.json: all of it is damaged"):
        verify_output(tmp_path / "out")
    path.unlink()
    with pytest.raises(ConversionError, match="cannot be read: No such file"):
        compare_output(plan, tmp_path / "out")
    with pytest.raises(ConversionError, match="cannot be read: No such file"):
        verify_output(tmp_path / "out")


def test_an_output_without_digests_says_so(hf: Path, tmp_path: Path) -> None:
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=tmp_path / "out")
    with pytest.raises(ConversionError, match="no digests, because it was converted without --verify"):
        verify_output(tmp_path / "out")
    with pytest.raises(ConversionError, match="has no manifest"):
        verify_output(hf)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 1}',
        '{"version": 1, "files": {"a": 3}}',
        '{"version": 1, "files": {"../a": {"size": 0, "ranges": []}}}',
        '{"version": 2}',
    ],
)
def test_a_broken_manifest_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "megabatch-manifest.json").write_text(text)
    (tmp_path / "a").write_text("")
    with pytest.raises(ConversionError, match="manifest"):
        verify_output(tmp_path)


def test_ranks_verify_their_own_share(hf: Path, verified: Path, tmp_path: Path) -> None:
    for rank in (1, 0, 2):
        convert(
            ConversionRequest(to_mcore=True, model=hf), output_dir=tmp_path / "out", verify=True, rank=rank, world=3
        )
    assert contents(tmp_path / "out") == contents(verified)


def test_nothing_gets_its_name_that_does_not_pass(hf: Path, tmp_path: Path) -> None:
    """Bytes that change on the disk between writing and verifying."""
    plan = make_plan(ConversionRequest(to_mcore=True, model=hf))

    def damage(what: str, size: int) -> None:
        if what == "written":
            for path in (tmp_path / ".out.partial" / "files" / "release").glob("*.distcp"):
                with open(path, "r+b") as file:
                    file.seek(plan.tensors[0].data_offset)
                    file.write(b"\x13\x37" * 8)

    with pytest.raises(ConversionError, match="differs from its source at byte"):
        convert(ConversionRequest(to_mcore=True, model=hf), output_dir=tmp_path / "out", verify=True, say=damage)
    assert not (tmp_path / "out").exists()


def test_shares_are_a_partition(hf: Path) -> None:
    plan = make_plan(ConversionRequest(to_mcore=True, model=hf))
    for world in (1, 2, 7, 500):
        shares = [share(plan, rank=rank, world=world) for rank in range(world)]
        assert sorted(number for one in shares for number in one) == list(range(len(plan.tensors)))


def test_the_manifest_tiles_every_file_that_was_made(back: Path, verified: Path) -> None:
    for folder in (back, verified):
        made = json.loads((folder / "megabatch-manifest.json").read_text())
        for name, file in made["files"].items():
            ends = [offset + size for _, offset, size, _ in file["ranges"]]
            starts = [offset for _, offset, _, _ in file["ranges"]]
            assert [*starts, file["size"]] == [0, *ends]
            assert file["size"] == (folder / name).stat().st_size
        listed = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert listed == {"megabatch-manifest.json", *made["files"]}
