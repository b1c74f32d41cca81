"""Weights from live megatron-core shards to engines, at every layout, and the proof that they arrived.

The engine on transformers is the reference: it computes the trainer's log-probabilities only if every tensor came.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import recipe, write_run

from megabatch.trainer.sync.dealing import dealt

LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 16, "target_modules": ["all-linear"]}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "cp2": ("qwen3_moe", 2, {"parallel": {"context_parallel_size": 2}}),
    "ep2": ("qwen3_moe", 2, {"parallel": {"expert_model_parallel_size": 2}}),
    "tp2_etp2": ("qwen3_moe", 2, {"parallel": {**TP2, "expert_tensor_parallel_size": 2}}),
    "tp2_ep2_pp2": ("qwen3_moe", 4, {"parallel": {**TP2, **PP2, "expert_model_parallel_size": 2}}),
    "tied_pp2_vpp2": ("qwen2", 2, {"parallel": {**PP2, "num_virtual_stages_per_pipeline_rank": 2}}),
    "lora_tp2": ("qwen3", 2, {"parallel": TP2, "tuner": LORA}),
    "lora_experts_ep2": ("qwen3_moe", 2, {"parallel": {"expert_model_parallel_size": 2}, "tuner": LORA}),
}
LIMIT = 20_000
"""Bytes of a bucket: the embedding is larger."""


def synced(run_dir: str) -> dict[str, Any]:
    """Metrics of an update; completions and their log-probabilities; the error where an engine loses a weight."""
    from megabatch.config.run import RunConfig
    from megabatch.errors import MegabatchError
    from megabatch.rollout.engine import Request, Sampling
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.sync.open import open_rollouts

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        draw_adapters(engine.model)
        rollouts = open_rollouts(run, source, ranks)
        rollouts._bucket_bytes = LIMIT
        metrics = rollouts.update(engine, 1)
        sampling = Sampling(temperature=0.8, max_tokens=6, stop_ids=())
        requests = [
            Request(key=f"1/{prompt}/{n}", prompt=(5 + prompt, 7, 9), sampling=sampling, seed=10 * prompt + n)
            for prompt in range(3)
            for n in range(2)
        ]
        completions = rollouts.generate(requests)
        mine = rollouts._mine
        assert mine is not None
        updates = updated_after_a_loss(rollouts, mine, engine, is_lost=ranks.rank == ranks.place.world_size - 1)
        lost = generated_after_a_loss(rollouts, mine, requests, is_lost=ranks.rank == ranks.place.world_size - 1)
        whole = mine.end_update

        def broken() -> None:
            whole()
            if ranks.rank == ranks.place.world_size - 1:
                mine._tensors["model.layers.1.self_attn.o_proj.weight"].mul_(1.5)  # type: ignore[attr-defined]

        mine.end_update = broken  # type: ignore[method-assign]
        try:
            rollouts.update(engine, 2)
            error = ""
        except MegabatchError as e:
            error = str(e)
        rollouts.close()
    return {
        "metrics": {k: v.value for k, v in metrics.items()},
        "completions": completions,
        "lost": lost,
        "updates": updates,
        "error": error,
    }


def generated_after_a_loss(rollouts: Any, mine: Any, requests: Any, *, is_lost: bool) -> tuple[list[Any], int, int]:
    """Completions where an engine is lost after its first; how often it was asked, and got weights."""
    from megabatch.rollout.engine import UnservedError

    generate, begin, asked, begun = mine.generate, mine.begin_update, [], []

    def losing(some: Any) -> Any:
        asked.append(some)
        if is_lost and len(asked) == 1:
            raise UnservedError("gone", generate(some[:1]))
        return generate(some)

    mine.generate, mine.begin_update = losing, lambda version: (begun.append(version), begin(version))
    try:
        return rollouts.generate(requests), len(asked), len(begun)
    finally:
        mine.generate, mine.begin_update = generate, begin


def updated_after_a_loss(rollouts: Any, mine: Any, engine: Any, *, is_lost: bool) -> tuple[dict[str, float], int]:
    """Metrics of an update in whose proof an engine is lost at first; how often engines got weights for it."""
    from megabatch.rollout.engine import LostError

    score, begin, asked, begun = mine.score, mine.begin_update, [], []

    def losing(some: Any) -> Any:
        asked.append(some)
        if is_lost and len(asked) == 1:
            raise LostError("gone")
        return score(some)

    mine.score, mine.begin_update = losing, lambda version: (begun.append(version), begin(version))
    try:
        return {name: one.value for name, one in rollouts.update(engine, 1).items()}, len(begun)
    finally:
        mine.score, mine.begin_update = score, begin


def draw_adapters(model: Any) -> None:
    """New adapters change nothing until they are trained."""
    with torch.no_grad():
        for chunk in model.chunks:
            for name, parameter in chunk.named_parameters():
                if ".lora." in name:
                    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_compute_what_the_trainer_computes(layout: str, ranks: RankServer, tmp_path: Path) -> None:
    model, world_size, groups = LAYOUTS[layout]
    made = recipe(tmp_path, model, **groups, resources={"tasks_per_node": world_size})
    run = write_run(made, tmp_path / "run")
    found = ranks.run(synced, world_size=world_size, run_dir=str(run))
    for one in found:
        assert 0 < one["metrics"]["sync_max_logp_difference"] < 1e-5
        assert one["metrics"]["sync_mean_logp_difference"] <= one["metrics"]["sync_max_logp_difference"]
        assert one["completions"] == found[0]["completions"]
        made, _, begun = one["lost"]
        assert [(c.key, c.ids) for c in made] == [(c.key, c.ids) for c in one["completions"]]
        assert begun == 1, "every engine gets the weights again, once"
        again, begun = one["updates"]
        assert begun == 2, "every engine gets the weights again where one was lost in the proof"
        assert again["sync_max_logp_difference"] == one["metrics"]["sync_max_logp_difference"]
        assert "after update 2 the engine's log-probabilities differ" in one["error"]
        assert "1 tensors differ: model.layers.1.self_attn.o_proj.weight" in one["error"]
    assert [one.key for one in found[0]["completions"]] == [f"1/{p}/{n}" for p in range(3) for n in range(2)]
    assert {version for one in found[0]["completions"] for version in one.versions} == {1}
    assert len({one.ids for one in found[0]["completions"]}) == 6


def test_completions_of_a_prompt_stay_on_one_engine() -> None:
    prompts = [(1,), (1,), (2,), (2,), (3,), (3,)]
    assert dealt(prompts, 2) == [[0, 1, 4, 5], [2, 3]]
    assert dealt(prompts, 4) == [[0, 4], [1, 5], [2], [3]]
    assert dealt([], 2) == [[], []]
