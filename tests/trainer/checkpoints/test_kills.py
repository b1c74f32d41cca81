"""Runs whose ranks are killed at random moments end as if nothing had happened: the same numbers, each sample once.

pytest tests/trainer/checkpoints/test_kills.py -s --kills 50 --kills_seed 3
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_run

from megabatch.rehearse.compare import COMPUTED, EVALUATED
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.saved.manifest import read_manifest

STEPS, BATCH = 10, 8
SAMPLES = 64
"""Eight steps are an epoch; the others begin the next one."""
STREAM = {"streaming": True, "shuffle_buffer_size": 32, "num_workers": 1}
LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.1, "target_modules": ["all-linear", "all-router"]}
KINDS: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
    "rows": ("qwen3", 1, {"data": {"num_workers": 1}}),
    "stream": ("qwen3", 2, {"data": STREAM}),
    "experts, a stream, LoRA": ("qwen3_moe", 2, {
        "data": STREAM, "tuner": LORA, "bridge": {"merge_lora": False},
        "parallel": {"expert_model_parallel_size": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}}),
}  # fmt: skip
EACH = 2
"""Kills of each kind, if nothing else is asked for."""


def train_until(run_dir: str, killed_at: int | None, victim: int) -> tuple[int, int]:
    """Trains one rank, which notes the samples of every step; (exit code, Python functions called in all threads).

    Args: killed_at: the call, of all those, in which the rank `victim` dies.
    """
    import os
    import signal
    import sys
    import threading

    from megabatch.trainer.engine import Engine

    step, calls = Engine.step, 0
    notes = os.open(Path(run_dir) / f"samples.{os.environ['RANK']}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def noted(self: Any, packs: Any, *arguments: Any, **keywords: Any) -> Any:
        found = [digest for pack in packs for digest in _digests(pack)]
        os.write(notes, json.dumps([keywords["accept"].keywords["number"], found]).encode() + b"\n")
        return step(self, packs, *arguments, **keywords)

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"
        if calls == killed_at and os.environ["RANK"] == str(victim):
            os.kill(os.getpid(), signal.SIGKILL)

    Engine.step = noted  # type: ignore[method-assign]
    threading.setprofile(count)
    sys.setprofile(count)
    try:
        return train(run_dir), calls
    finally:
        sys.setprofile(None)


def _digests(pack: Any) -> Iterator[int]:
    """Of the tokens of each sequence."""
    starts = pack.cu_seqlens_padded[: pack.sequences + 1].tolist()
    for start, stop in pairwise(starts):
        yield zlib.crc32(pack.ids_T[start:stop].numpy().tobytes())


@dataclass(frozen=True)
class Killed:
    """Runs of one kind, which are killed."""

    ranks: RankServer
    folder: Path
    kind: str
    rng: random.Random

    def run(self, name: str) -> Path:
        model, world_size, groups = KINDS[self.kind]
        made = recipe(
            self.folder,
            model,
            training={"train_iters": STEPS},
            batch={"global_batch_size": BATCH},
            model={"num_layers": 2},
            checkpoint={"save_interval": 2, "async_save": True, "save_total_limit": 2},
            evaluation={"eval_on_start": False, "eval_interval": 5},
            resources={"tasks_per_node": world_size},
            **groups,
        )
        return write_run(made, self.folder / name)

    def attempt(self, run: Path, killed_at: int | None) -> list[int] | None:
        """The calls of each rank; None where the run was killed. Raises: RuntimeError if it failed otherwise."""
        victim = self.rng.randrange(self.world_size)
        try:
            ended = self.ranks.run(
                train_until, world_size=self.world_size, run_dir=str(run), killed_at=killed_at, victim=victim
            )
        except RuntimeError as error:
            if f"rank {victim} of {self.world_size}: killed" in str(error):
                return None
            raise
        assert {code for code, _ in ended} == {ExitCode.DONE}
        return [calls for _, calls in ended]

    @property
    def world_size(self) -> int:
        return KINDS[self.kind][1]


def samples(run: Path) -> dict[int, list[int]]:
    """Of every step, over all ranks; a step that was done again had the same ones."""
    found: dict[int, list[int]] = {}
    for file in sorted(run.glob("samples.*.jsonl")):
        steps: dict[int, list[int]] = {}
        for step, digests in map(json.loads, file.read_text().splitlines()):
            assert steps.setdefault(step, digests) == digests, f"step {step} had other samples again"
        for step, digests in steps.items():
            found.setdefault(step, []).extend(digests)
    return found


def require_same(run: Path, whole: Path) -> None:
    """Bit for bit: every line that was written, also of steps done again, the samples, and the last checkpoint."""
    for kind, names in (("train", COMPUTED), ("eval", EVALUATED)):
        expected = {line["step"]: [line[name] for name in names] for line in metrics(whole, kind)}
        found = [(line["step"], [line[name] for name in names]) for line in metrics(run, kind)]
        assert {step for step, _ in found} == expected.keys()
        assert [(step, numbers) for step, numbers in found if numbers != expected[step]] == []
    assert samples(run) == samples(whole)
    assert _files(RunDirectory(run).step(STEPS)) == _files(RunDirectory(whole).step(STEPS))
    assert _adapters(run) == _adapters(whole)


def _files(checkpoint: Path) -> dict[str, Any]:
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    own = ("trainer.json", "adapter_config.json")  # an adapter's names the base, which is a folder of its run
    return {name: file for name, file in manifest.files.items() if Path(name).name not in own}


def _adapters(run: Path) -> list[str]:
    """What the last checkpoint says of its adapters, with the run's place left out."""
    files = sorted(RunDirectory(run).step(STEPS).rglob("adapter_config.json"))
    return [file.read_text().replace(str(run), "RUN") for file in files]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kill_is_resumed_bit_for_bit(
    kind: str, ranks: RankServer, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, seed = request.config.getoption("kills"), request.config.getoption("kills_seed")
    wanted = EACH if asked is None else -(-asked // len(KINDS))
    killed = Killed(ranks, tmp_path, kind, random.Random(f"{kind} {seed}"))
    whole = killed.run("whole")
    calls = killed.attempt(whole, None)
    assert calls is not None
    epoch = [digest for step in range(1, SAMPLES // BATCH + 1) for digest in samples(whole)[step]]
    assert len(set(epoch)) == len(epoch) == SAMPLES, "an epoch has every sample once"
    kills, saving, done = 0, 0, 0
    while kills < wanted:
        run, done = killed.run(f"killed from {kills}"), done + 1
        while killed.attempt(run, killed.rng.randrange(min(calls)) if kills < wanted else None) is None:
            kills += 1
            saving += any((run / "checkpoints").glob(".*.tmp"))
        require_same(run, whole)
    with capsys.disabled():
        of_these = f"{saving} of them while a checkpoint was written"
        print(f"\n{kind}, seed {seed}: {kills} kills, {of_these}, before {done} runs of {STEPS} steps were done")
