"""Engines with adapters for tests: numbers that add something, gradients by PEFT's names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megabatch import Model, Recipe
from megabatch.config.run import RunConfig
from megabatch.trainer.made_tensors import MadeTensors

COMMON: dict[str, Any] = {
    "vocab_size": 301,  # does not divide by 2: tensor parallelism pads it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3", {}),
    "biased": ("qwen2", {"tie_word_embeddings": True}),
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                              "norm_topk_prob": True}),
    "mixed": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                            "norm_topk_prob": True, "mlp_only_layers": [1]}),
}  # fmt: skip


def make_base(folder: Path, name: str) -> Path:
    """A random model saved by transformers, with a tokenizer of bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megabatch.data.tokens.tokenizer import train_bpe

    kind, fields = BASES[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **fields}))
    model.save_pretrained(folder / name)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder / name)
    return folder / name


def beside(made: Recipe, base: Path, dtype: str = "float32") -> Recipe:
    """The recipe with a base of its own."""
    return replace(made, model=Model(model=str(base), torch_dtype=dtype))


class Trained(MadeTensors):
    """Adapters as if they had been trained: normal numbers in all of them."""

    def made(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name]).normal_(0.0, 0.1, generator=self.generator(name))


@contextmanager
def opened(run_dir: str, *, trained: bool = True) -> Iterator[tuple[Any, Any, Any]]:
    """(run, loop, progress) on one rank of a run."""
    from megabatch.trainer import assemble, starting
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.signals import StopSignal

    if trained:
        starting.FreshAdapters = lambda targets, *, seed, start: Trained(  # type: ignore[attr-defined, misc]
            {name: dims for target in targets for name, dims in target.peft_shapes().items()}, seed=1
        )
    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        yield run, loop, progress


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Of the adapter's matrices, by their names in PEFT's folder; on one rank."""
    from megabatch.converters.shards import assemble
    from megabatch.trainer.weights import bytes_of, placed

    lora = engine.model.tuning.lora
    shapes = {name: dims for target in lora.targets for name, dims in target.peft_shapes().items()}
    found = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for item in placed(engine.model, lora.table, engine.ranks, adapter="default"):
        data = bytes_of(item.parameter.main_grad)
        padded = engine.model.padded_vocab_size if item.mapped.split == "vocab" else None
        for rows in assemble(item.mapped, [data], itemsize=4, padded_vocab=padded):
            part = torch.frombuffer(bytearray(rows.data), dtype=torch.float32).view(-1, *shapes[rows.hf][1:])
            found[rows.hf][rows.row_start : rows.row_start + len(part)] = part
    return found
