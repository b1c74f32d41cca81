"""Checkpoints are checked before they are trusted: damaged bytes are found, set aside, and never trained on."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, forget_digests, metrics, recipe, train, write_run

from megabatch import Model, MoE
from megabatch.converters import ConversionRequest, convert
from megabatch.errors import ConversionError
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.saved.check import faults
from megabatch.saved.history import go_back, misplaced, notes
from megabatch.saved.manifest import MANIFEST, read_manifest

STEPS = 2
"""A checkpoint after each; the run has one step more."""
Damage = Callable[[Path, random.Random, list[Path]], None]


def flip(file: Path, rng: random.Random, others: list[Path]) -> None:
    at = rng.randrange(file.stat().st_size)
    with open(file, "r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << rng.randrange(8)]))


def truncate(file: Path, rng: random.Random, others: list[Path]) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def delete(file: Path, rng: random.Random, others: list[Path]) -> None:
    file.unlink()


def append(file: Path, rng: random.Random, others: list[Path]) -> None:
    with open(file, "ab") as opened:
        opened.write(rng.randbytes(rng.randint(1, 64)))


def swap(file: Path, rng: random.Random, others: list[Path]) -> None:
    other = rng.choice([path for path in others if path.read_bytes() != file.read_bytes()])
    aside = file.with_name("aside")
    file.rename(aside)
    other.rename(file)
    aside.rename(other)


def stand_in(file: Path, rng: random.Random, others: list[Path]) -> None:
    """Something that is no file."""
    file.unlink()
    rng.choice([os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])(file)


def older(file: Path, rng: random.Random, others: list[Path]) -> None:
    """The same file of the checkpoint before, or all of that."""
    step = next(path for path in file.parents if path.name.startswith("step_"))
    before = step.with_name(f"step_{STEPS - 1:08d}")
    if rng.random() < 0.3 or file.read_bytes() == (before / file.relative_to(step)).read_bytes():
        shutil.rmtree(step)
        shutil.copytree(before, step)
    else:
        shutil.copy(before / file.relative_to(step), file)


DAMAGES: list[Damage] = [flip, flip, truncate, delete, append, swap, stand_in, older]


def make(folder: Path, name: str, world_size: int, **checkpoint: Any) -> Path:
    made = recipe(
        folder,
        model={"num_layers": 1},
        batch={"micro_batch_size": 1, "global_batch_size": 2},
        training={"train_iters": STEPS + 1},
        checkpoint={"save_interval": 1, **checkpoint},
        evaluation={"eval_iters": 0},
        resources={"tasks_per_node": world_size},
    )
    return write_run(made, folder / name)


@pytest.fixture(scope="module")
def wholes(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of one rank and one of two, from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    made = {world_size: make(folder, f"run{world_size}", world_size) for world_size in (1, 2)}
    for world_size, run in made.items():
        assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {ExitCode.DONE}
    return made


@pytest.fixture(scope="module")
def whole(wholes: dict[int, Path]) -> Path:
    return wholes[2]


def cut(whole: Path, to: Path) -> Path:
    """The same run as if it had been lost after its second checkpoint."""
    shutil.copytree(whole, to)
    made = json.loads((to / "run.json").read_text())
    (to / "run.json").write_text(json.dumps({**made, "run_dir": str(to)}))
    shutil.rmtree(to / "checkpoints" / f"step_{STEPS + 1:08d}")
    (to / "checkpoints" / "latest").write_text(f"step_{STEPS:08d}\n")
    (to / "metrics.jsonl").unlink()
    return to


def resume(run_dir: str) -> str:
    """Starts a run anew and says how it ended."""
    from megabatch.errors import MegabatchError

    try:
        return str(int(train(run_dir)))
    except MegabatchError as e:
        return str(e)


def damage_of(folder: Path) -> list[str]:
    """What `megabatch checkpoint verify` finds."""
    from megabatch.errors import CheckpointError

    try:
        manifest = read_manifest(folder)
    except CheckpointError as e:
        return [str(e)]
    if manifest is None:
        return [f"{MANIFEST}: is missing"]
    if found := faults(manifest, workers=2):
        return found
    fault = misplaced(folder, json.loads((folder / "trainer.json").read_text())["step"])
    return [] if fault is None else [fault]


@pytest.mark.timeout(900)
def test_fifty_random_damages(wholes: dict[int, Path], ranks: RankServer, tmp_path: Path) -> None:
    """Every fourth with two ranks, each of which reads what both have written."""
    broken = {}
    for seed in range(50):
        world_size = 2 if seed % 4 == 0 else 1
        rng, run = random.Random(seed), cut(wholes[world_size], tmp_path / str(seed))
        newest = run / "checkpoints" / f"step_{STEPS:08d}"
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        if seed % 3:  # most of them in what a resume loads
            files = [path for path in files if "hf" not in path.parts]
        damage, file = rng.choice(DAMAGES), rng.choice(files)
        damage(file, rng, files)
        broken[run] = world_size, f"{damage.__name__} {file.relative_to(newest)}, seed {seed}"
        assert damage_of(newest), broken[run]
    for run, (world_size, what) in broken.items():
        ends = ranks.run(resume, world_size=world_size, run_dir=str(run))
        assert ends == [str(int(ExitCode.DONE))] * world_size, what
        first = metrics(run)[0]["step"]
        assert first in (STEPS, STEPS + 1), what
        assert curve(run) == curve(wholes[world_size])[first - 1 :], f"{what}: it trained on damage"
        aside = [note.name for note in notes(RunDirectory(run))]
        assert aside == ([f"damaged.step_{STEPS:08d}"] if first == STEPS else []), what
        assert first == STEPS or " hf/" in what or f" {MANIFEST}" in what, f"{what}: nothing was noticed"


def test_what_is_said_of_damage(whole: Path, ranks: RankServer, tmp_path: Path) -> None:
    run = cut(whole, tmp_path / "run")
    for seed, step in enumerate((1, STEPS)):
        flip(next((run / "checkpoints" / f"step_{step:08d}" / "mcore").glob("*.distcp")), random.Random(seed), [])
    said, _ = ranks.run(resume, world_size=2, run_dir=str(run))
    assert said.startswith(
        f"{run}/checkpoints: every checkpoint is damaged, and nothing was changed or set aside (step_"
    )
    assert "step_00000002: mcore/__" in said and "step_00000001: mcore/__" in said
    assert sorted(p.name for p in (run / "checkpoints").glob("*step_*")) == ["step_00000001", "step_00000002"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002\n"


def resume_on_a_failing_disk(run_dir: str, failing: str) -> str:
    """The same where reads of files below folders of this name fail."""
    import errno

    read = os.preadv

    def fails(file: int, *rest: Any) -> int:
        if failing in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, *rest)

    os.preadv = fails
    try:
        return resume(run_dir)
    finally:
        os.preadv = read


def test_a_disk_that_fails_is_no_damage(whole: Path, ranks: RankServer, tmp_path: Path) -> None:
    """Nothing is set aside; the run goes on from the checkpoint before, or ends where there is none."""
    run = cut(whole, tmp_path / "run")
    said, _ = ranks.run(resume_on_a_failing_disk, world_size=2, run_dir=str(run), failing="/checkpoints/step_")
    folder = f"{run}/checkpoints"
    assert said.startswith(f"{folder}: no checkpoint can be read here, and nothing was changed or set aside (step_")
    assert f"step_00000002: {folder}/step_00000002/mcore/__" in said and "step_00000001: " in said
    assert ".distcp cannot be read: Input/output error" in said
    ends = ranks.run(resume_on_a_failing_disk, world_size=2, run_dir=str(run), failing=f"/step_{STEPS:08d}/")
    assert ends == ["0", "0"]
    assert curve(run) == curve(whole)[STEPS - 1 :]
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert names == [f"step_{step:08d}" for step in range(1, STEPS + 2)]


def named(run: Path, name: str) -> Path:
    """The run with an id, as the launcher gives it, in its folder."""
    made = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**made, "run_dir": str(run), "provenance": {"id": name}}))
    return run


def test_a_checkpoint_of_another_run_is_not_resumed_from(whole: Path, ranks: RankServer, tmp_path: Path) -> None:
    """Of the same shapes, layout and step. A run that is copied whole goes on."""
    first = named(cut(whole, tmp_path / "first"), "first")  # its checkpoints are of before there were ids
    assert ranks.run(resume, world_size=2, run_dir=str(first)) == ["0", "0"]
    newest = f"step_{STEPS + 1:08d}"
    copied = named(Path(shutil.copytree(first, tmp_path / "copied")), "first")
    assert json.loads((copied / "checkpoints" / newest / "trainer.json").read_text())["run"] == "first"
    second = named(cut(whole, tmp_path / "second"), "second")
    shutil.copytree(first / "checkpoints" / newest, second / "checkpoints" / newest)
    for run, aside in ((copied, []), (second, [f"damaged.{newest}"])):
        (run / "checkpoints" / "latest").unlink()
        assert ranks.run(resume, world_size=2, run_dir=str(run)) == ["0", "0"]
        found = notes(RunDirectory(run))
        assert [note.name for note in found] == aside
        assert all("trainer.json: is of another run" in note.why for note in found)


def test_a_checkpoint_without_digests_still_loads(whole: Path, ranks: RankServer, tmp_path: Path) -> None:
    run = cut(whole, tmp_path / "run")
    forget_digests(run / "checkpoints" / f"step_{STEPS:08d}")
    ranks.run(train, world_size=2, run_dir=str(run))
    assert curve(run) == curve(whole)[STEPS:]


def test_one_without_digests_that_lacks_bytes_is_set_aside(whole: Path, ranks: RankServer, tmp_path: Path) -> None:
    run = cut(whole, tmp_path / "run")
    newest = run / "checkpoints" / f"step_{STEPS:08d}"
    forget_digests(newest)
    for file in (newest / "mcore").glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    ranks.run(train, world_size=2, run_dir=str(run))
    assert curve(run) == curve(whole)[STEPS - 1 :]
    assert [note.kind for note in notes(RunDirectory(run))] == ["damaged"]


def test_latest_says_where_a_run_goes_on(whole: Path, ranks: RankServer, tmp_path: Path) -> None:
    by_hand, by_command = cut(whole, tmp_path / "hand"), cut(whole, tmp_path / "command")
    (by_hand / "checkpoints" / "latest").write_text("step_00000001\n")
    go_back(RunDirectory(by_command), "1")
    for run in (by_hand, by_command):
        ranks.run(train, world_size=2, run_dir=str(run), stop_after=1)
        assert curve(run) == curve(whole)[1:2]
        # what was later is no checkpoint any more: the next attempt goes on in the new history
        names = sorted(path.name for path in (run / "checkpoints").glob("*step_*"))
        assert names == ["later.step_00000002", "step_00000001", "step_00000002"]
        ranks.run(train, world_size=2, run_dir=str(run))
        assert curve(run) == curve(whole)[1:]


def test_another_run_refuses_a_damaged_checkpoint(whole: Path, ranks: RankServer, tmp_path: Path) -> None:
    source = cut(whole, tmp_path / "source")
    newest = source / "checkpoints" / f"step_{STEPS:08d}"
    flip(next((newest / "mcore").glob("*.distcp")), random.Random(3), [])
    run = make(tmp_path, "run", 2, load=str(source))
    said, _ = ranks.run(resume, world_size=2, run_dir=str(run))
    assert str(newest) in said and "mcore/__" in said and "differs from its digest" in said
    assert newest.is_dir()


def test_another_run_refuses_damaged_weights_as_its_model(whole: Path, ranks: RankServer, tmp_path: Path) -> None:
    hf = cut(whole, tmp_path / "source") / "checkpoints" / f"step_{STEPS:08d}" / "hf"
    config = hf / "config.json"
    config.write_text(config.read_text() + "\n")  # people edit those
    run = made_from(tmp_path, hf, "intact")
    assert set(ranks.run(train, world_size=2, run_dir=str(run))) == {0}
    weights = hf / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    with pytest.raises(RuntimeError, match=r"is damaged\n *hf/model.safetensors: .* differs from its digest"):
        ranks.run(train, world_size=2, run_dir=str(made_from(tmp_path, hf, "damaged")))


def made_from(folder: Path, hf: Path, name: str) -> Path:
    """A run of one step that begins with a model."""
    made = recipe(folder, training={"train_iters": 1}, resources={"tasks_per_node": 2})
    return write_run(replace(made, model=Model(model=str(hf), torch_dtype="float32"), moe=MoE()), folder / name)


def test_converters_check_what_they_read(whole: Path, tmp_path: Path) -> None:
    run = cut(whole, tmp_path / "run")
    step = run / "checkpoints" / f"step_{STEPS:08d}"
    request = ConversionRequest(to_hf=True, mcore_model=step, model=step / "hf")
    convert(request, output_dir=tmp_path / "intact", verify=True)
    assert (tmp_path / "intact" / "model.safetensors").is_file()
    manifest = read_manifest(step)
    assert manifest is not None
    parts = [(name, part) for name, file in manifest.below("mcore").items() for part in file.ranges]
    for wanted, is_read in (("optimizer.state.exp_avg.output_layer.weight", False), ("output_layer.weight", True)):
        name, part = next((name, part) for name, part in parts if part.name == wanted)
        middle = part.offset + part.size // 2
        with open(step / name, "r+b") as file:
            file.seek(middle)
            byte = file.read(1)[0]
            file.seek(middle)
            file.write(bytes([byte ^ 8]))
        if is_read:
            with pytest.raises(ConversionError, match=f"(?s)is damaged.*{name}: {wanted} differs from its digest"):
                convert(request, output_dir=tmp_path / "damaged", verify=True)
        else:
            convert(request, output_dir=tmp_path / "state", verify=True)
    assert not (tmp_path / "damaged").exists()
    flip(step / "hf" / "model.safetensors", random.Random(1), [])
    with pytest.raises(ConversionError, match="is damaged"):
        convert(ConversionRequest(to_mcore=True, model=step / "hf"), output_dir=tmp_path / "mcore", verify=True)
