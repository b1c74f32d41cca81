"""Small runs for tests: data, recipes, and a function that trains one on each rank of a RankServer world."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from megabatch import (
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    Grpo,
    LearningRate,
    Logging,
    Model,
    MoE,
    Parallel,
    Recipe,
    Resources,
    Rlhf,
    Rollout,
    Training,
)
from megabatch.config.run import RunConfig, resolve
from megabatch.entry.model import find_model
from megabatch.saved.manifest import MANIFEST

SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "padded_vocab_size": 304,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "add_qkv_bias": False, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "qwen2": {"model_type": "qwen2", "add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    "qwen3": {"model_type": "qwen3", "add_qkv_bias": False, "qk_layernorm": True},
    "qwen3_moe": {"model_type": "qwen3_moe", "add_qkv_bias": False, "qk_layernorm": True},
}  # fmt: skip


def write_dataset(path: Path, *, samples: int = 64, seed: int = 0) -> Path:
    """Sums with answers, as query and response."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(samples):
            numbers = [rng.randint(0, 99) for _ in range(rng.randint(2, 6))]
            row = {"query": f"What is {' + '.join(map(str, numbers))}?", "response": f"It is {sum(numbers)}."}
            file.write(json.dumps(row) + "\n")
    return path


def recipe(folder: Path, model: str = "qwen3_moe", /, **groups: dict[str, Any]) -> Recipe:
    """A recipe of four steps on a made dataset; keyword arguments replace fields of groups."""
    if not (folder / "train.jsonl").exists():
        write_dataset(folder / "train.jsonl")
        write_dataset(folder / "validation.jsonl", samples=7, seed=1)
    return recipe_on(folder, model, **groups)


def recipe_on(folder: Path, model: str, /, **groups: dict[str, Any]) -> Recipe:
    """The same without making the dataset."""
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    made = Recipe(
        name="test",
        task="sft",
        model=Model(**SHAPE, **MODELS[model]),
        moe=MoE(num_experts=4, moe_ffn_hidden_size=16, moe_router_topk=2) if model == "qwen3_moe" else MoE(),
        data=Data(dataset=[str(train)], val_dataset=[str(validation)], max_length=128, num_workers=0),
        batch=Batch(micro_batch_size=2, global_batch_size=8),
        training=Training(train_iters=4, seed=3),
        parallel=Parallel(distributed_backend="gloo"),
        learning_rate=LearningRate(lr=5e-3, min_lr=1e-4),
        checkpoint=Checkpoint(save_interval=100),
        logging=Logging(log_interval=1),
        evaluation=Evaluation(eval_on_start=True, eval_interval=2),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=1),
    )
    return with_fields(made, **groups)


def with_fields(made: Recipe, **groups: dict[str, Any]) -> Recipe:
    return replace(made, **{name: replace(getattr(made, name), **fields) for name, fields in groups.items()})


def generating(made: Recipe, rollout: Rollout) -> Recipe:
    """The recipe as one of GRPO."""
    grpo = Grpo(reward_funcs=["format"], num_generations=2)
    return replace(made, task="rlhf", rlhf=Rlhf(rlhf_type="grpo"), grpo=grpo, rollout=rollout)


def write_run(made: Recipe, run_dir: Path) -> Path:
    """Resolves a recipe into a run directory as the launcher does."""
    found = find_model(made)
    assert found.shape is not None and found.fault is None, found.fault
    run_dir.mkdir(parents=True, exist_ok=True)
    resolve(made, shape=found.shape, run_dir=run_dir, provenance={}).save(run_dir / "run.json")
    return run_dir


def train(run_dir: str, stop_after: int | None = None) -> int:
    """Trains one rank of a run; the stop request arrives while step `stop_after` is computed."""
    import warnings

    warnings.simplefilter("ignore")
    from megabatch.trainer import loop
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.engine import Engine
    from megabatch.trainer.signals import StopSignal

    stop = StopSignal()
    if stop_after is not None:
        step, done = Engine.step, 0

        def counted(engine: Engine, *arguments: Any, **keywords: Any) -> Any:
            nonlocal done
            done += 1
            if done == stop_after:
                keywords["flags"] = keywords["flags"]._replace(stop=engine.ranks.is_main)
            return step(engine, *arguments, **keywords)

        Engine.step = counted  # type: ignore[method-assign]
    return int(loop.train(RunConfig.load(Path(run_dir) / "run.json"), stop, Activity(0)))


def train_in_buckets(run_dir: str, bucket_size: int, cache: str | None = None) -> int:
    """Trains one rank with so many numbers in a bucket of gradients and parameters: megatron-core's own 40 million
    make one bucket of a small model. Args: cache: a folder of tokens for several runs."""
    from megabatch.trainer import assemble

    if cache is not None:
        os.environ["MEGABATCH_CACHE"] = cache
    made = assemble.ddp_config
    assemble.ddp_config = lambda **keywords: replace(made(**keywords), bucket_size=bucket_size)
    return train(run_dir)


def forget_digests(checkpoint: Path) -> None:
    """Makes a checkpoint as it was saved before there were digests."""
    (checkpoint / MANIFEST).unlink()
    state = json.loads((checkpoint / "trainer.json").read_text())
    del state["manifest"]
    (checkpoint / "trainer.json").write_text(json.dumps(state))


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every training step, in the order they were written."""
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run_dir)]


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["eval_loss"]) for m in metrics(run_dir, "eval")]
