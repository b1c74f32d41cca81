"""`megabatch checkpoint verify`, `resume --from`, and what `status` and `why` say of damage."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "saved"))

from made import make_checkpoint, make_run

from megabatch.cli.command import main
from megabatch.run_directory import RunDirectory
from megabatch.saved.history import settle
from megabatch.saved.manifest import MANIFEST, File, manifest_text


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)


def test_intact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 1, 2)
    assert main(["checkpoint", "verify", str(run.path)]) == 0
    assert main(["checkpoint", "verify", str(run.step(2)), "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(run.step(1)), str(run.step(2)), str(run.step(2))]
    assert all(line.endswith(": intact, 4 files, 6332 bytes") for line in lines)


def test_damage_is_named_by_step_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 1, 2, 3)
    damage(run.step(2) / "mcore" / "__1_0.distcp")
    (run.step(3) / MANIFEST).unlink()
    assert main(["checkpoint", "verify", str(run.path)]) == 1
    said = capsys.readouterr().out
    assert f"{run.step(2)}: damaged\n  mcore/__1_0.distcp: tensor0 differs from its digest\n" in said
    assert f"{run.step(3)}: damaged\n  {MANIFEST}: is missing\n" in said
    assert said.endswith("2 of 3 checkpoints are damaged: step_00000002, step_00000003\n")
    assert main(["checkpoint", "verify", str(run.step(2))]) == 1


def make_small_run(folder: Path, **state: object) -> RunDirectory:
    """A run with a checkpoint of step 1, of which there is only `trainer.json`, with this state."""
    run = make_run(folder, 1)
    text = json.dumps({**state, "manifest": MANIFEST})
    (run.step(1) / "trainer.json").write_text(text)
    (run.step(1) / MANIFEST).write_text(manifest_text({"trainer.json": File.of(text.encode())}))
    for part in ("hf", "mcore"):
        shutil.rmtree(run.step(1) / part)
    return run


def test_a_copy_of_another_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_small_run(tmp_path / "run", step=1)
    assert main(["checkpoint", "verify", str(run.step(1))]) == 0
    shutil.copytree(run.step(1), run.step(2))
    assert main(["checkpoint", "verify", str(run.path)]) == 1
    assert f"{run.step(2)}: damaged\n  trainer.json: is of step 1: the folder is a copy" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_small_run(tmp_path / "run", step=1, run="ab")
    for own, code in (('"ab"', 0), ('"cd"', 1)):
        run.run_json.write_text(f'{{"provenance": {{"id": {own}}}}}')
        assert main(["checkpoint", "verify", str(run.path)]) == code
    assert f"{run.step(1)}: damaged\n  trainer.json: is of another run; to begin with" in capsys.readouterr().out
    run.run_json.write_text('{"provenance": {}}')
    assert main(["checkpoint", "verify", str(run.step(1))]) == 0


@pytest.mark.parametrize("name", ["latest", "best"])
@pytest.mark.parametrize("text", ["", "step_0000000a\n", "step_00000007\n", "\0", "../checkpoints/none"])
def test_a_pointer_to_nothing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    run = make_run(tmp_path / "run", 1, 2)
    (run.checkpoints / name).write_text(text)
    assert main(["checkpoint", "verify", str(run.path)]) == 1
    said = capsys.readouterr().out
    assert f"{run.checkpoints / name}: names a checkpoint that does not exist; the run" in said
    assert ("write step_00000002 into it" if name == "latest" else "delete it, or write") in said
    (run.checkpoints / name).unlink()
    assert main(["checkpoint", "verify", str(run.path)]) == 0


def test_a_checkpoint_of_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "step_00000001")
    (folder / MANIFEST).unlink()
    (folder / "trainer.json").write_text("{}")
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert "not checked" in capsys.readouterr().out


def test_a_converted_model_with_a_file_of_its_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = b"{}"
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    files = {"config.json": {"size": 2, "ranges": [["all of it", 0, 2, digest]]}}
    (tmp_path / MANIFEST).write_text(json.dumps({"version": 1, "digest": "blake2b-128", "files": files}))
    (tmp_path / "config.json").write_bytes(data)
    (tmp_path / "notes.md").write_text("mine")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: intact, 1 files, 2 bytes\n"
    (tmp_path / "config.json").write_bytes(b"[]")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "is not a checkpoint" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(tmp_path / "x")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_status_and_why_say_what_was_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 1, 2)
    settle(run, run.step(1), [(run.step(2), "trainer.json: is missing")], [])
    told = "step_00000002 is damaged (trainer.json: is missing), set aside as damaged.step_00000002"
    assert main(["status", str(run.path), "--json"]) == 0
    [one] = json.loads(capsys.readouterr().out)
    assert one["damaged"] == [f"{told}; resumed from step_00000001"]
    assert main(["why", str(run.path)]) == 0
    assert f"checkpoint: {told}" in capsys.readouterr().out


def test_from_is_refused_where_it_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run(tmp_path / "a", 1, 2), make_run(tmp_path / "b", 1)
    assert main(["resume", str(tmp_path), "--from", "1"]) == 2
    assert "resume them one by one" in capsys.readouterr().err
    assert main(["resume", str(run.path), "--from", "step_00000005"]) == 1
    assert "there are: step_00000001, step_00000002" in capsys.readouterr().err
