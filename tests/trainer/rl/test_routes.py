"""Experts as in the pass of old log-probabilities: recorded and replayed at every layout, and in whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_server import RankServer
from runs import curve, metrics, recipe, train, with_fields, write_run
from test_grpo_runs import grpo_recipe

from megabatch.config.grpo import Grpo
from megabatch.config.run import RunConfig
from megabatch.ledger.reader import Reader
from megabatch.rl.rounds import Rolled
from megabatch.run_directory import RunDirectory
from megabatch.trainer.rl.recorded import rolled

EXPERTS, CHOSEN, LAYERS = 4, 2, 4
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "ep2_shared": (2, {"parallel": {"expert_model_parallel_size": 2}, "batch": {"micro_batch_size": 2}}),
    "tp2_sp": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}}),
    "pp2_vpp2": (2, {"parallel": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}}),
    "cp2_shared": (2, {"parallel": {"context_parallel_size": 2}, "batch": {"micro_batch_size": 2}}),
    "recomputed": (1, {"recompute": {"recompute_granularity": "full", "recompute_method": "uniform",
                                     "recompute_num_layers": 1}, "batch": {"micro_batch_size": 4}}),
    "experts_recomputed": (1, {"recompute": {"recompute_granularity": "selective", "recompute_modules": ("moe",)}}),
}  # fmt: skip
"""Ranks and groups; what is compared with one process, a completion in a row. Where it says so, two completions share
their prompt."""


def made(vocab: int) -> list[Rolled]:
    """Completions, two of each prompt, with routes that no router would choose."""
    rng = np.random.default_rng(3)

    def tokens() -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(3, vocab, rng.integers(2, 12)).astype(np.int32)
        return ids, rng.random((len(ids), LAYERS, EXPERTS)).argsort(-1)[..., :CHOSEN].astype(np.uint8)

    found = []
    for number in range(8):
        if number % 2 == 0:
            prompt, before = tokens()
        ids, behind = tokens()
        draws = np.concatenate([before, behind])
        found.append(
            Rolled(
                key=f"0/0/{number}", place="made", prompt=prompt, ids=ids, versions=np.zeros(len(ids), np.int32),
                finish="stop", rewards=(1.0,), advantage=float(rng.normal()), routes=draws,
            )
        )  # fmt: skip
    return found


def measured(run_dir: str, logps: Any = None, shares: bool = False) -> dict[str, Any]:
    """Log-probabilities and routes of the router's own choices; the loss of a step on other routes; and how far
    log-probabilities move with changed routers, with and without the routes of before."""
    import torch

    from megabatch.trainer import assemble
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.data.dataset import share_of
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.objectives.grpo import GrpoObjective
    from megabatch.trainer.readouts.tokens import Tokens
    from megabatch.trainer.rl.batch import Batching
    from megabatch.trainer.signals import StopSignal

    run = RunConfig.load(Path(run_dir) / "run.json")
    grpo = Grpo(loss_type="dapo", beta=0.0, kl_in_reward=False, epsilon_high=0.2)
    with assemble.join_ranks(run) as ranks:
        loop, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        engine = loop.engine
        share = replace(share_of(run, ranks), shares_prompts=shares)
        together = 2 if shares else 1
        batching = Batching(
            share=share,
            group=1,
            together=together,
            infer_batch_size=share.micro_batch_size,
            inferred_together=together,
            filters_cut_off=False,
        )
        plain, some = Tokens(1.0), made(run.shape.vocab_size)
        own, chosen = zip(*batching.logps_and_routes(engine, some, plain), strict=True)
        olds = own if logps is None else logps

        def step(completions: list[Rolled]) -> dict[str, Any]:
            whole = batching.step(completions, cursor={}, epoch=0.0)
            objective = GrpoObjective(grpo, temperature=1.0, max_completion_length=16)
            result = engine.step(
                whole.packs, objective, totals=whole.totals, filled=whole.filled, accept=lambda found: False
            )
            return {name: ratio.value for name, ratio in result.metrics.items()} | {"grad_norm": result.grad_norm}

        with_old = [replace(one, tokens={"old": np.asarray(old)}) for one, old in zip(some, olds, strict=True)]
        replayed = [replace(one, routes=routes) for one, routes in zip(with_old, chosen, strict=True)]
        found = {
            "logps": own, "chosen": chosen, "foreign": step(with_old), "replayed": step(replayed),
            "own": step([replace(one, routes=None) for one in with_old]),
        }  # fmt: skip
        with torch.no_grad():
            for name, parameter in (pair for chunk in engine.model.chunks for pair in chunk.named_parameters()):
                if "router" in name:
                    parameter.add_(0.02 * torch.cos(torch.arange(parameter.numel()).view_as(parameter) * 1.7))
        found["moved"] = step(replayed), step([replace(one, routes=None) for one in with_old])
        found["flipped"] = sum(
            int((np.sort(before) != np.sort(now)).any(-1).sum())
            for before, (_, now) in zip(chosen, batching.logps_and_routes(engine, some, plain), strict=True)
        )
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routes")


@pytest.fixture(scope="module")
def alone(ranks: RankServer, folder: Path) -> dict[str, Any]:
    run = write_run(recipe(folder, "qwen3_moe"), folder / "alone")
    found: dict[str, Any] = ranks.run(measured, world_size=1, run_dir=str(run))[0]
    return found


def test_a_row_replays_what_it_recorded(alone: dict[str, Any]) -> None:
    assert alone["replayed"] == alone["own"] and alone["replayed"]["ratio"] == 1
    foreign, own = alone["foreign"], alone["own"]
    assert abs(foreign["loss"] - own["loss"]) > 1e-5 < abs(foreign["grad_norm"] - own["grad_norm"])
    tokens = [len(one.prompt) + len(one.ids) for one in made(304)]
    assert [routes.shape for routes in alone["chosen"]] == [(count, LAYERS, CHOSEN) for count in tokens]


def test_replay_keeps_choices_that_flip(alone: dict[str, Any]) -> None:
    """Small changes of routers move few choices and, with them, log-probabilities; replay moves only weights."""
    assert alone["flipped"] > 3
    with_replay, without = alone["moved"]
    assert abs(with_replay["ratio"] - 1) < 0.5 * abs(without["ratio"] - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_route(layout: str, ranks: RankServer, folder: Path, alone: dict[str, Any]) -> None:
    world_size, groups = LAYOUTS[layout]
    groups = {**groups, "resources": {"tasks_per_node": world_size}}
    run = write_run(recipe(folder, "qwen3_moe", **groups), folder / layout)
    how = {"run_dir": str(run), "logps": alone["logps"], "shares": layout.endswith("shared")}
    for found in ranks.run(measured, world_size=world_size, **how):
        for name in ("logps", "chosen"):
            for one, expected in zip(found[name], alone[name], strict=True):
                assert one == pytest.approx(expected, abs=1e-5), name
        for name in ("foreign", "replayed"):
            assert found[name] == pytest.approx(alone[name], rel=2e-5, abs=1e-6), name


def replaying(folder: Path, *, world_size: int = 1, steps: int = 2, **groups: Any) -> Any:
    """A whole run in bfloat16."""
    grpo = {"router_replay_mode": "R2", "steps_per_generation": steps, "beta": 0.0}
    other = recipe(folder, "qwen3_moe")
    run = replace(
        grpo_recipe(folder, world_size=world_size, grpo=grpo),
        model=replace(other.model, torch_dtype="bfloat16"),
        moe=replace(other.moe, moe_aux_loss_coeff=0.01),
    )
    return with_fields(
        run, evaluation={"eval_iters": 0}, batch={"micro_batch_size": 2, "global_batch_size": 16}, **groups
    )


def test_a_run_stopped_within_a_round_replays_its_routes(ranks: RankServer, folder: Path) -> None:
    def run_of(name: str, **more: Any) -> Path:
        run = write_run(replaying(folder, world_size=2, parallel={"expert_model_parallel_size": 2}), folder / name)
        assert set(ranks.run(train, world_size=2, run_dir=str(run), **more)) == {75 if more else 0}
        return run

    whole, cut = run_of("whole"), run_of("cut", stop_after=3)
    assert set(ranks.run(train, world_size=2, run_dir=str(cut))) == {0}
    assert curve(cut) == curve(whole)
    assert metrics(whole)[0]["ratio"] == pytest.approx(1, abs=1e-2)


def test_a_policy_on_its_own_completions_has_ratio_one(ranks: RankServer, folder: Path) -> None:
    run = write_run(replaying(folder, steps=1, training={"train_iters": 2}), folder / "on_policy")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    assert [line["ratio"] for line in metrics(run)] == [1, 1]


def trained_on_other_routes(run_dir: str) -> tuple[int, list[list[list[int]]]]:
    """With engines that send every token to the experts after those that their routers chose. Returns: what the
    trainer's routers of the last layer took in the training passes of the first step, [T, K] of each micro-batch."""
    import torch

    from megabatch.rollout.local.routing import Recorder
    from megabatch.trainer.megatron_moe import Chosen

    take, choose = Recorder.take, Chosen.get_replay_topk
    taken: list[list[list[int]]] = []

    def noted(chosen: Any, *given: Any, **more: Any) -> Any:
        scores, experts = choose(chosen, *given, **more)
        if torch.is_grad_enabled() and chosen._layer == LAYERS - 1 and len(taken) < COMPLETIONS:
            taken.append(experts.tolist())
        return scores, experts

    Recorder.take = lambda one, rows: (take(one, rows) + 1) % EXPERTS  # type: ignore[method-assign]
    Chosen.get_replay_topk = noted  # type: ignore[method-assign]
    try:
        return train(run_dir), taken
    finally:
        Recorder.take, Chosen.get_replay_topk = take, choose  # type: ignore[method-assign]


COMPLETIONS = 8


def test_r3_takes_the_experts_of_the_engine(ranks: RankServer, folder: Path) -> None:
    """Of every token in training passes; and the gradient is that of transformers in float64 with these experts."""
    grpo = {"router_replay_mode": "R3", "steps_per_generation": 1, "beta": 0.0, "loss_type": "dapo"}
    other = recipe(folder, "qwen3_moe")
    made = replace(grpo_recipe(folder, grpo=grpo), model=other.model, moe=replace(other.moe, moe_aux_loss_coeff=0.0))
    made = with_fields(
        made, evaluation={"eval_iters": 0}, training={"train_iters": 2}, optimizer={"clip_grad": 0.0},
        checkpoint={"save_interval": 1, "save_safetensors_interval": 1},
    )  # fmt: skip
    run = write_run(made, folder / "r3")
    [(code, taken)] = ranks.run(trained_on_other_routes, world_size=1, run_dir=str(run))
    assert code == 0
    first, second = ([rolled(record) for record in Reader(RunDirectory(run).ledger).records(step)] for step in (1, 2))
    for one in first:  # in whatever order micro-batches come
        assert one.routes is not None and one.routes.shape == (len(one.prompt) + len(one.ids), LAYERS, CHOSEN)
        size = len(one.routes) - 1
        taken.remove(next(some for some in taken if np.array_equal(some[:size], one.routes[:-1, -1].tolist())))
    assert not taken
    expected = gradient_of_transformers(run / "checkpoints" / "step_00000001" / "hf", second)
    assert metrics(run)[1]["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert metrics(run)[1]["ratio"] == 1
    without = [replace(one, routes=None) for one in second]
    assert abs(gradient_of_transformers(run / "checkpoints" / "step_00000001" / "hf", without) - expected) > 1e-4


def gradient_of_transformers(folder: Path, completions: list[Rolled]) -> float:
    """L2 norm of the gradient of - A log p summed over the completions' tokens / their number, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    routers = [one for name, one in model.named_modules() if type(one).__name__ == "Qwen3MoeTopKRouter"]
    total = sum(len(one.ids) for one in completions)
    for one in completions:
        hooks = []
        for layer, router in enumerate(routers if one.routes is not None else ()):
            chosen_TK = torch.tensor(one.routes[:, layer].astype(np.int64))  # type: ignore[index]

            def routed(router: Any, given: Any, returned: Any, chosen_TK: torch.Tensor = chosen_TK) -> Any:
                scores_TK = returned[0].softmax(-1).gather(1, chosen_TK)
                return returned[0], scores_TK / scores_TK.sum(-1, keepdim=True), chosen_TK

            hooks.append(router.register_forward_hook(routed))
        ids = torch.tensor(np.concatenate([one.prompt, one.ids]).astype(np.int64))
        logps_T = model(ids[None]).logits[0, len(one.prompt) - 1 : -1].log_softmax(-1)
        own_T = logps_T.gather(1, ids[len(one.prompt) :, None])
        (-one.advantage * own_T.sum() / total).backward()
        for hook in hooks:
            hook.remove()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
