"""Runs of new models on synthetic data, for the benchmarks that train."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from megabatch import (
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    LearningRate,
    Logging,
    Model,
    MoE,
    Parallel,
    Recipe,
    Resources,
    Training,
)
from megabatch.config.new_model import declared_shape
from megabatch.config.run import RunConfig, resolve
from megabatch.converters.families import family_named, family_of
from megabatch.converters.hf_model import read_config
from megabatch.entry.infer_batch import default_infer_batch_size, with_infer_batch_size

SMALL: dict[str, Any] = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4,
                         "num_query_groups": 2, "kv_channels": 32, "padded_vocab_size": 2048}  # fmt: skip
"""About the model of `recipes/gsm8k_sft.py`: Python's share of a step is large."""
MEDIUM: dict[str, Any] = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 8,
                          "num_query_groups": 4, "kv_channels": 32, "padded_vocab_size": 4096}  # fmt: skip
"""Large enough for a CPU that arithmetic takes nearly all of a step."""
WEIGHTY: dict[str, Any] = {"num_layers": 10, "hidden_size": 512, "ffn_hidden_size": 2048, "num_attention_heads": 8,
                           "num_query_groups": 4, "kv_channels": 64, "padded_vocab_size": 16384}  # fmt: skip
"""About 220 MiB in fp32."""
LARGE: dict[str, Any] = {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 6144, "num_attention_heads": 16,
                         "num_query_groups": 8, "kv_channels": 128, "padded_vocab_size": 32768}  # fmt: skip
"""For one GPU."""
EXPERTS = MoE(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=96)
LARGE_EXPERTS = MoE(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=2048)


def write_text(path: Path, *, rows: int, words: int) -> Path:
    """Rows of made-up prose, for pre-training: long enough to fill any row that is cut to length."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(3000)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(json.dumps({"text": " ".join(rng.choices(vocabulary, k=words))}) + "\n")
    return path


def recipe(folder: Path, model: dict[str, Any], *, experts: MoE | None = None, **groups: dict[str, Any]) -> Recipe:
    """Every row is cut to `max_length`, so that rows are equally long; `groups` replace fields of groups."""
    length = groups.get("data", {}).get("max_length", 128)
    text = folder / "train.jsonl"
    if not text.exists():
        write_text(text, rows=256 if length <= 4096 else 64, words=length)
    made = Recipe(
        name="bench",
        task="pt",
        model=Model(
            model_type="qwen3_moe" if experts else "qwen3",
            qk_layernorm=True,
            max_position_embeddings=max(length, 256),
            **{"torch_dtype": "float32", **model},
        ),
        moe=experts or MoE(),
        data=Data(dataset=[str(text)], max_length=128, truncation_strategy="right", num_workers=1),
        batch=Batch(micro_batch_size=4, global_batch_size=16),
        training=Training(train_iters=10_000),
        parallel=Parallel(distributed_backend="gloo"),
        learning_rate=LearningRate(lr=1e-3, min_lr=1e-4),
        logging=Logging(log_interval=10),
        evaluation=Evaluation(eval_iters=0),
        checkpoint=Checkpoint(save_interval=10_000),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=1),
    )
    return replace(made, **{name: replace(getattr(made, name), **fields) for name, fields in groups.items()})


def write_run(made: Recipe, run_dir: Path) -> RunConfig:
    """Resolves a recipe into a run directory, as the launcher does."""
    if made.model.model is not None:
        config = read_config(made.model.model)
        shape = family_of(config).shape(config)
    else:
        declared = declared_shape(made)
        assert declared is not None
        family = family_named(declared.model_type)
        shape = family.shape(family.hf_config(declared))
    if (size := default_infer_batch_size(made, shape)) is not None:
        made = with_infer_batch_size(made, shape, size)
    run_dir.mkdir(parents=True, exist_ok=True)
    run = resolve(made, shape=shape, run_dir=run_dir, provenance={})
    run.save(run_dir / "run.json")
    return run
