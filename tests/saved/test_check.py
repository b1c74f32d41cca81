"""Every byte of a checkpoint at rest counts: in the files, in their names, and in the manifest itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from made import make_checkpoint

from megabatch.saved.check import faults
from megabatch.saved.manifest import MANIFEST, DamagedError, read_file, read_manifest


def found(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return faults(manifest, workers=3)


def test_an_intact_one(tmp_path: Path) -> None:
    assert found(make_checkpoint(tmp_path / "step_00000001")) == []


@pytest.mark.parametrize("name", ["mcore/__1_0.distcp", "trainer.json", "hf/config.json"])
def test_each_flipped_byte_is_found_and_named(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step_00000001")
    whole = (folder / name).read_bytes()
    for at in range(0, len(whole), 1 + len(whole) // 40):
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        [line] = found(folder)
        assert line.startswith(f"{name}: ") and line.endswith("differs from its digest")


def test_missing_resized_and_left_over_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step_00000001")
    (folder / "trainer.json").unlink()
    with open(folder / "hf" / "config.json", "ab") as file:
        file.write(b" ")
    (folder / "mcore" / "__2_0.distcp").write_bytes(b"x")
    assert sorted(found(folder)) == [
        "hf/config.json: has 60 bytes instead of 59",
        "mcore/__2_0.distcp: does not belong to this checkpoint",
        "trainer.json: is missing",
    ]


def test_each_flipped_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step_00000001")
    whole = (folder / MANIFEST).read_bytes()
    for at in range(len(whole)):
        (folder / MANIFEST).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedError, match=f"^{MANIFEST}: is not valid"):
            read_manifest(folder)
    for length in range(0, len(whole), 17):
        (folder / MANIFEST).write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=f"^{MANIFEST}: is not valid"):
            read_manifest(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_manifest_names_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    made = {"version": 1, "digest": "blake2b-128", "files": {name: {"size": 0, "ranges": []}}}
    (tmp_path / MANIFEST).write_text(json.dumps(made))
    with pytest.raises(DamagedError, match="not a file of this folder"):
        read_manifest(tmp_path)


def test_ranges_leave_no_byte_out(tmp_path: Path) -> None:
    for ranges in ([["a", 1, 9, None]], [["a", 0, 4, None], ["b", 5, 5, None]], [["a", 0, 9, None]]):
        made = {"version": 1, "digest": "blake2b-128", "files": {"x": {"size": 10, "ranges": ranges}}}
        (tmp_path / MANIFEST).write_text(json.dumps(made))
        with pytest.raises(DamagedError, match=r"x (has a gap|ends)"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself"])
@pytest.mark.parametrize("name", ["trainer.json", "mcore/__0_0.distcp", MANIFEST])
def test_what_is_no_file_is_damage_and_never_waited_for(name: str, kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step_00000001")
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(folder / name)
    if name == MANIFEST:
        with pytest.raises(DamagedError, match=f"^{MANIFEST}: is not a file$"):
            read_manifest(folder)
        return
    assert found(folder) == [f"{name}: is not a file"]
    with pytest.raises(DamagedError, match=f"^{name}: is not a file$"):
        read_file(folder / name, name)
