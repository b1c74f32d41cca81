"""Whole GRPO runs that generate with a real vLLM server: killed and requeued, and ahead of training."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import runs
from rank_server import RankServer
from safetensors.torch import load_file, save_file
from vllm_python import NEEDS_VLLM
from vllm_server import TOKEN, Running

from megabatch import Grpo, Model, MoE, Recipe, Rlhf, Rollout
from megabatch.ledger.reader import Reader

pytestmark = NEEDS_VLLM
REWARD = """
def letters(completions, **columns):
    return [len(set(text)) / 10 for text in completions]
"""
GAME = """
import random

DICE = random.Random(1)

class Game:
    def reset(self, messages, solution, **columns):
        assert solution.startswith("It is")
        self.turn = 0
    def step(self, completion):
        self.turn += 1
        return f"turn {self.turn}", float(DICE.random() < 0.5), self.turn == 2
"""
AHEAD = {"async_generate": True, "max_staleness": 2}


@pytest.fixture(scope="module")
def folder(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    running.revive()
    server = running.server()
    server.wait()
    server.close()
    found = tmp_path_factory.mktemp("server-runs")
    (found / "reward.py").write_text(REWARD)
    (found / "game.py").write_text(GAME)
    return found


def grpo_recipe(
    folder: Path,
    running: Running,
    *,
    steps: int,
    ranks: int = 1,
    parallel: Mapping[str, Any] = MappingProxyType({}),
    grpo: Mapping[str, Any] = MappingProxyType({}),
    **rollout: Any,
) -> Recipe:
    made = runs.recipe(
        folder,
        parallel=dict(parallel),
        resources={"tasks_per_node": ranks},
        training={"train_iters": steps, "seed": 3},
        data={"max_length": 64},
        batch={"micro_batch_size": 1},
        checkpoint={"save_interval": 1},
        evaluation={"eval_iters": 0},
    )
    return replace(
        made,
        task="rlhf",
        model=Model(model=str(running.folder), torch_dtype="float32"),
        moe=MoE(),
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(**{"reward_funcs": [f"{folder / 'reward.py'}:letters"], "num_generations": 4, "beta": 0.0, **grpo}),
        rollout=Rollout(
            temperature=1.0,
            vllm_mode="server",
            vllm_server_base_url=f"http://127.0.0.1:{running.port}",
            **{"max_completion_length": 24, **rollout},
        ),
    )


def killed(run_dir: str, in_step: int | None = None, in_update: int | None = None) -> int:
    """Trains on each rank, which dies by SIGKILL with its completions generated and not trained, or halfway through
    sending weights; None for neither."""
    from megabatch.rollout.vllm.server import Server
    from megabatch.trainer.engine import Engine

    os.environ["MEGABATCH_ROLE_TOKEN"] = TOKEN
    for owner, name, number in ((Engine, "step", in_step), (Server, "put", in_update)):
        if number is not None:
            setattr(owner, name, dying(getattr(owner, name), number))
    return runs.train(run_dir)


def serverless(run_dir: str, server: int, in_step: int) -> str:
    """Trains until the server is killed in a step, for good; the error that ends the run."""
    from megabatch.errors import RolloutError
    from megabatch.rollout.vllm.server import Server
    from megabatch.trainer.engine import Engine

    os.environ["MEGABATCH_ROLE_TOKEN"] = TOKEN
    step, waits, calls = Engine.step, Server.wait, 0

    def impatient(self: Server) -> None:
        self._timeout_s = 0.1
        waits(self)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == in_step:
            os.killpg(server, signal.SIGKILL)
            Server.wait = impatient  # type: ignore[method-assign]
        return step(*arguments, **keywords)

    Engine.step = counted  # type: ignore[method-assign]
    with pytest.raises(RolloutError) as caught:
        runs.train(run_dir)
    return str(caught.value)


def dying(method: Any, number: int) -> Any:
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments, **keywords)

    return counted


def run_of(ranks: RankServer, made: Recipe, run_dir: Path, *, deaths: int = 0) -> Path:
    run, world_size = runs.write_run(made, run_dir), made.resources.world_size
    how: list[dict[str, int]] = [{"in_step": 2}, {"in_update": 2}][:deaths]
    for death in how:
        with pytest.raises(RuntimeError, match="killed: hung or crashed"):
            ranks.run(killed, world_size=world_size, run_dir=str(run), **death)
    assert ranks.run(killed, world_size=world_size, run_dir=str(run)) == [0] * world_size
    return run


def brief(model: Path, copy: Path) -> Path:
    """The same model, which ends a turn after a few tokens more often than not."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][2] *= 6
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def curve_of(run: Path) -> dict[int, tuple[float, ...]]:
    return {line["step"]: (line["loss"], line["grad_norm"], line["reward"]) for line in runs.metrics(run)}


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def keys_of(run: Path) -> dict[int, list[str]]:
    reader = Reader(run / "ledger")
    return {step: [record.key for record in reader.records(step)] for step in reader.steps}


def test_a_trainer_that_is_killed_twice_ends_with_the_undisturbed_curve(
    ranks: RankServer, running: Running, folder: Path
) -> None:
    """In a step, and in the middle of sending weights, while the server lives on."""
    made = grpo_recipe(folder, running, steps=3)
    calm = run_of(ranks, made, folder / "calm")
    disturbed = run_of(ranks, made, folder / "disturbed", deaths=2)
    assert curve_of(disturbed) == curve_of(calm)
    for step in (1, 2, 3):
        a, b = (Reader(run / "ledger").records(step) for run in (calm, disturbed))
        assert [(one.key, one.ids, one.versions) for one in a] == [(one.key, one.ids, one.versions) for one in b]
        for one, other in zip(a, b, strict=True):  # a server batches requests as they arrive: last bits may differ
            assert one.logps == pytest.approx(other.logps, abs=1e-5)


def test_generation_ahead_of_training_is_bounded_and_loses_nothing(
    ranks: RankServer, running: Running, folder: Path
) -> None:
    """On two data-parallel ranks that are killed twice: every prompt's completions are trained on once, whichever
    attempt generated them."""
    run = run_of(ranks, grpo_recipe(folder, running, steps=5, ranks=2, **AHEAD), folder / "ahead", deaths=2)
    keys = keys_of(run)
    assert sorted(keys) == [1, 2, 3, 4, 5]
    for step, found in keys.items():
        assert found == [f"{step - 1}/{prompt}/{number}" for prompt in range(2) for number in range(4)]
    prompts = Counter(tuple(one.prompt_ids) for step in keys for one in Reader(run / "ledger").records(step))
    assert set(prompts.values()) == {4}, "the prompts of an epoch are all different"
    for step in keys:
        for one in Reader(run / "ledger").records(step):
            versions = list(one.versions)
            assert versions == sorted(versions) and max(0, step - 3) <= versions[0] <= versions[-1] <= step - 1
    lines = {line["step"]: line for line in runs.metrics(run)}
    assert max(line["staleness_max"] for line in lines.values()) in (1, 2)
    for line in lines.values():  # the correction is of the policies that drew the tokens
        assert (line["rollout_max_difference"] > 1e-3) == (line["staleness_max"] > 0), line["step"]
    assert all(line["wait_s"] >= 0 and line["rollout_ess"] > 0 for line in lines.values())
    assert lines[5]["in_flight"] == lines[5]["landed"] == 0, "nothing is begun for after the end"
    assert lines[1]["staleness_max"] == 0


def test_conversations_and_prompts_drawn_again_go_ahead_at_any_layout(
    ranks: RankServer, running: Running, folder: Path
) -> None:
    """An environment answers on rank 0 while four ranks train, prompts whose completions are equally good make room
    for others, and all ranks are killed in a step."""
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    drawn = {"num_generations": 2, "dynamic_sample": True, "max_resample_times": 2, "reward_funcs": []}
    turns = {"gym_env": f"{folder / 'game.py'}:Game", "use_gym_env": True, "max_turns": 3, "max_completion_length": 8}
    made = grpo_recipe(folder, running, steps=4, ranks=4, parallel=layout, grpo=drawn, **turns, **AHEAD)
    made = replace(made, model=replace(made.model, model=str(brief(running.folder, folder / "brief"))))
    run = run_of(ranks, made, folder / "conversations", deaths=1)
    records = {step: Reader(run / "ledger").records(step) for step in (1, 2, 3, 4)}
    everything = [one for some in records.values() for one in some]
    assert [len(some) for some in records.values()] == [8] * 4
    assert len({one.key for one in everything}) == 32
    assert set(Counter(tuple(one.prompt_ids) for one in everything).values()) == {2}, "no prompt comes twice"
    for step, some in records.items():
        for one in some:
            versions = list(one.versions)
            assert versions == sorted(versions) and max(0, step - 3) <= versions[0] <= versions[-1] <= step - 1
            assert len(one.mask) == len(one.ids) == len(one.logps)
    assert any(0 in one.mask for one in everything), "some conversations have several turns"
    assert any("." in one.key for one in everything), "some prompts were drawn in place of others"
    lines = runs.metrics(run)
    assert all(line["rollout_ess"] > 0 and math.isfinite(line["loss"]) for line in lines)
    assert max(line["staleness_max"] for line in lines) in (1, 2)
    assert all(line["rollout_max_difference"] < 1e-3 for line in lines if line["staleness_max"] == 0)


def test_what_a_lead_has_begun_is_trained_on_without_one(ranks: RankServer, running: Running, folder: Path) -> None:
    """A checkpoint with rounds in flight resumes in the synchronous schedule: the same prompts in the same order."""
    ahead = runs.write_run(grpo_recipe(folder, running, steps=3, **AHEAD), folder / "changed")
    with pytest.raises(RuntimeError, match="killed: hung or crashed"):
        ranks.run(killed, world_size=1, run_dir=str(ahead), in_step=2)
    runs.write_run(grpo_recipe(folder, running, steps=3), ahead)
    assert ranks.run(killed, world_size=1, run_dir=str(ahead)) == [0]
    assert keys_of(ahead) == keys_of(folder / "calm")
    assert [record.prompt_ids for record in Reader(ahead / "ledger").records(3)] == [
        record.prompt_ids for record in Reader(folder / "calm" / "ledger").records(3)
    ]


def test_a_run_whose_server_is_killed_while_it_generates_goes_on_with_another(
    ranks: RankServer, running: Running, folder: Path
) -> None:
    """Two rounds are begun when it dies. The run ends with one error after its step, and its resume trains on every
    completion once."""
    running.revive()
    server = running.server()
    server.wait()
    run = runs.write_run(grpo_recipe(folder, running, steps=3, **AHEAD), folder / "serverless")
    (error,) = ranks.run(serverless, world_size=1, run_dir=str(run), server=running.process.pid, in_step=1)
    said = f"rollout server http://127.0.0.1:{running.port} did not answer for 0.1 s (rollout.vllm_server_timeout)"
    assert error.startswith(f"{said}, at last: ")
    (line,) = runs.metrics(run)
    assert line["step"] == 1 and line["in_flight"] + line["landed"] == 16 and saved(run) == ["latest", "step_00000001"]
    running.process.wait()
    running.revive()
    server.wait()
    server.close()
    assert ranks.run(killed, world_size=1, run_dir=str(run)) == [0]
    assert keys_of(run) == {step: [f"{step - 1}/{p}/{n}" for p in range(2) for n in range(4)] for step in (1, 2, 3)}
    for step in (1, 2, 3):
        for one in Reader(run / "ledger").records(step):
            versions = list(one.versions)
            assert versions == sorted(versions) and max(0, step - 3) <= versions[0] <= versions[-1] <= step - 1
