"""A real vLLM inside the ranks on CPUs: weights from live shards, completions and their log-probabilities, mistakes.

The reference is an engine on transformers in the same ranks, with the same weights.
"""

from __future__ import annotations

import os
import random
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distilled_in_vllm import apart_in_first_step
from rank_server import RankServer
from runs import generating, recipe, train, write_run
from vllm_python import NEEDS_VLLM

from megabatch import Model, MoE, Rollout
from megabatch.data.tokens.tokenizer import train_bpe
from megabatch.errors import RolloutError
from megabatch.rollout.engine import Request, Sampling

pytestmark = NEEDS_VLLM
LIMIT = 20_000
"""Bytes of a bucket: the embedding is larger."""
LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 16, "target_modules": ["all-linear"]}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
WORLDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "moe_dp2": ("qwen3_moe", 1, {"parallel": {"expert_model_parallel_size": 2}}),
    "moe_tp2": ("qwen3_moe", 2, {"parallel": {**TP2, "expert_tensor_parallel_size": 2}}),
    "dense_lora_tp2": ("qwen3", 2, {"tuner": LORA}),
    "dense_adapter_tp2": ("qwen3", 2, {"tuner": LORA, "parallel": TP2}),
}
"""Model, ranks of an engine, and how two ranks train; with `adapter` in the name it is sent alone."""
SAMPLINGS = (
    Sampling(temperature=1.0, max_tokens=8, stop_ids=()),
    Sampling(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2, max_tokens=6, stop_ids=()),
)


def requests() -> list[Request]:
    return [
        Request(key=f"1/{prompt}/{n}", prompt=(5 + prompt, 7, 9), sampling=SAMPLINGS[n], seed=10 * prompt + n)
        for prompt in range(3)
        for n in range(2)
    ]


def inside_the_ranks(run_dir: str) -> dict[str, Any]:
    """What a rank sees of an engine over its life; every rank does the same."""
    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.sync.open import open_rollouts

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        before = _state()
        rollouts = open_rollouts(run, source, ranks)
        rollouts._bucket_bytes = LIMIT
        mine = rollouts._mine
        assert mine is not None
        bases = _counted(mine)
        found: dict[str, Any] = {"unready": _error(lambda: mine.generate(requests()))}
        found["metrics"] = []
        for version in (1, 2):
            _change(engine.model, version)
            metrics = rollouts.update(engine, version)
            found["metrics"].append({name: ratio.value for name, ratio in metrics.items()})
        found["completions"], found["again"] = rollouts.generate(requests()), rollouts.generate(requests())
        found["stopped"] = mine.generate([_stopping(found["completions"])])
        long = replace(requests()[0], prompt=(5,) * 60)
        found["long"], found["empty"] = (_error(lambda one=one: mine.generate([one])) for one in (
            long, replace(long, prompt=())
        ))  # fmt: skip
        found["is_kept"] = _state() == before
        oracle = open_rollouts(replace(run, recipe=replace(run.recipe, rollout=Rollout())), source, ranks)
        oracle.update(engine, 2)
        found["oracle"] = oracle.generate(requests())
        assert oracle._mine is not None
        found["scores"] = oracle._mine.score([(one.prompt, made.ids) for one, made in
                                              zip(requests(), found["completions"], strict=True)])  # fmt: skip
        _change(engine.model, 3)
        found["wrong"] = _error(lambda: rollouts_disagree(rollouts, engine))
        found["after"] = rollouts.update(engine, 4)["sync_max_logp_difference"].value
        found["bases"] = len(bases)
        rollouts.close()
    return found


def _counted(engine: Any) -> list[int]:
    """The versions for which it got the weights, and not an adapter alone."""
    begin, begun = engine.begin_update, []

    def counted(version: int) -> None:
        begun.append(version)
        begin(version)

    engine.begin_update = counted
    return begun


def rollouts_disagree(rollouts: Any, engine: Any) -> None:
    """An update of which every engine loses a tensor."""
    put = rollouts._mine.put

    def losing(bucket: Any) -> None:
        kept = tuple(part for part in bucket.parts if "layers.1.self_attn.o_proj" not in part.name)
        if kept:
            put(replace(bucket, parts=kept))

    rollouts._mine.put = losing
    try:
        rollouts.update(engine, 3)
    finally:
        rollouts._mine.put = put


def _stopping(completions: Any) -> Request:
    return replace(requests()[0], sampling=replace(SAMPLINGS[0], stop_ids=(completions[0].ids[3],)))


def _error(action: Any) -> str:
    try:
        action()
    except RolloutError as e:
        return str(e)
    return ""


def _state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), torch.set_num_threads]


def _change(model: Any, version: int) -> None:
    """Other weights; adapters have none before they are trained."""
    with torch.no_grad():
        for chunk in model.chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {version}".encode()))
                    drawn = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter)
                    parameter.copy_(drawn if ".lora." in name else parameter + drawn)


def colocated(folder: Path, model: str, engine_ranks: int, groups: dict[str, Any], *, alone: bool) -> Path:
    made = recipe(
        folder, model, **{"model": {"kv_channels": 32}, "data": {"max_length": 56}, **groups},
        resources={"tasks_per_node": 2},
    )  # fmt: skip
    rollout = Rollout(
        vllm_mode="colocate", vllm_tensor_parallel_size=engine_ranks, vllm_max_model_len=64, vllm_enforce_eager=True,
        vllm_max_num_seqs=8, max_completion_length=8, vllm_enable_lora=alone,
        vllm_engine_kwargs={"kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 256},
    )  # fmt: skip
    return write_run(generating(made, rollout), folder / "run")


@pytest.mark.parametrize("world", WORLDS)
def test_an_engine_in_the_ranks(world: str, ranks_with_vllm: RankServer, tmp_path: Path) -> None:
    model, engine_ranks, groups = WORLDS[world]
    alone = "adapter" in world
    run = colocated(tmp_path, model, engine_ranks, groups, alone=alone)
    for found in (everyones := ranks_with_vllm.run(inside_the_ranks, world_size=2, run_dir=str(run))):
        assert "the engine has no weights" in found["unready"]
        for metrics in found["metrics"]:
            assert 0 < metrics["sync_max_logp_difference"] < 1e-4
        made = found["completions"]
        assert made == everyones[0]["completions"] == found["again"]
        assert [one.key for one in made] == [request.key for request in requests()]
        assert {version for one in made for version in one.versions} == {2}
        assert len({one.ids for one in made}) == 6
        for number in (0, 2, 4):
            assert made[number].logps == pytest.approx(found["scores"][number], abs=1e-4)
        assert found["stopped"][0].finish == "stop" and found["stopped"][0].ids == made[0].ids[:4]
        assert (
            "60 tokens of a prompt and 8 of a completion are more than the engine's max_model_len=64" in found["long"]
        )
        assert "a prompt needs tokens between 0 and 303, and has 0" in found["empty"]
        assert found["is_kept"], "generators, threads and their setter are the trainer's own"
        assert "after update 3 the engine's log-probabilities differ" in found["wrong"]
        assert "this engine cannot tell which tensors differ" in found["wrong"]
        assert found["after"] < 1e-4
        assert found["bases"] == (1 if alone else 4)


def fails_alone(run_dir: str, fails: int) -> None:
    """Starts an engine of two ranks, of which one finds no model."""
    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.sync.open import open_rollouts

    words = os.open(f"{run_dir}/words{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY)
    os.dup2(words, 2)
    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        if ranks.rank == fails:
            source = replace(source, config_folder=Path("/nowhere"))
        open_rollouts(run, source, ranks)


def test_an_engine_that_fails_on_one_rank_ends_the_others(ranks_with_vllm: RankServer, tmp_path: Path) -> None:
    """They wait for it inside vLLM, where no exception reaches them."""
    run = colocated(tmp_path, "qwen3", 2, {}, alone=False)
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: Traceback(.|\n)*RolloutError: vLLM does not start: "):
        ranks_with_vllm.run(fails_alone, world_size=2, run_dir=str(run), fails=1)
    assert re.match(
        "error: rank 1 failed: vLLM does not start: .*nowhere", (run / "words0").read_text().splitlines()[-1]
    )


def distilling(folder: Path) -> Path:
    """A run of two ranks whose student answers in every step, with a teacher that is split over both."""
    for name, seed, width in (("student", 1, 32), ("teacher", 2, 48)):
        torch.manual_seed(seed)
        config = transformers.Qwen3Config(
            vocab_size=304, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.2,
        )  # fmt: skip
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder / name)
        train_bpe(["a small text"], vocab_size=300, out_dir=folder / name)
    made = recipe(
        folder,
        training={"train_iters": 2},
        data={"max_length": 64},
        batch={"global_batch_size": 4},
        evaluation={"eval_iters": 0, "eval_on_start": False},
        resources={"tasks_per_node": 2},
        rlhf={"rlhf_type": "gkd"},
        gkd={
            "teacher_model": str(folder / "teacher"), "lmbda": 1.0, "beta": 0.3,
            "teacher_tensor_model_parallel_size": 2,
        },
        rollout={
            "vllm_mode": "colocate", "vllm_max_model_len": 96, "vllm_enforce_eager": True, "vllm_max_num_seqs": 8,
            "vllm_engine_kwargs": {"kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 256},
            "max_completion_length": 12, "temperature": 1.0,
        },
    )  # fmt: skip
    model = Model(model=str(folder / "student"), torch_dtype="float32")
    return write_run(replace(made, task="rlhf", model=model, moe=MoE()), folder / "run")


def test_a_student_is_distilled_on_its_own_answers(ranks_with_vllm: RankServer, tmp_path: Path) -> None:
    """What the first step logs is what transformers finds for the answers in the ledger, in fp64."""
    run = distilling(tmp_path)
    assert ranks_with_vllm.run(train, world_size=2, run_dir=str(run)) == [0, 0]
    found, expected, largest = apart_in_first_step(run, tmp_path / "student", tmp_path / "teacher", beta=0.3)
    assert found == pytest.approx(expected, rel=1e-5)
    assert largest < 1e-4
