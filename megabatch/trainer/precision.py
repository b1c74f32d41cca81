"""Compares transformers' model of a Hugging Face folder with ours of a checkpoint, on the same tokens, layer by layer.

A program, started by `megabatch-convert --test_convert_precision`: python -m megabatch.trainer.precision HF_FOLDER
CHECKPOINT --dtype float32. The models are in memory one after the other, never both.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabatch.errors import CheckpointError, MegabatchError

# S tokens of one sequence, H hidden size, V vocabulary


@dataclass(frozen=True, slots=True)
class Threshold:
    """Largest errors that pass, as parts of the expected values' largest magnitude."""

    max: float
    mean: float


THRESHOLDS = {
    "float32": Threshold(max=1e-4, mean=1e-5),
    "bfloat16": Threshold(max=math.inf, mean=1e-2),
}
"""By the dtype of the arithmetic. In float32 only the order of sums differs. In bfloat16 every layer rounds to eight
bits, and a router may choose another expert for a token whose scores nearly tie: only the mean is judged."""


WEIGHTS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one model computed."""

    layers: list[Tensor]
    """Output of each decoder layer, [S, H] fp32."""
    logits: Tensor
    """[S, V] fp32."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor is from what was expected."""

    max: float
    mean: float
    scale: float
    """Largest magnitude of the expected values."""

    @staticmethod
    def of(found: Tensor, expected: Tensor) -> Difference:
        error = (found.double() - expected.double()).abs()
        return Difference(float(error.max()), float(error.mean()), float(expected.abs().max()))

    def passes(self, threshold: Threshold) -> bool:
        """NaN never does."""
        scale = self.scale or 1.0
        return self.max <= threshold.max * scale and self.mean <= threshold.mean * scale


def of_transformers(folder: Path, ids_S: Tensor, *, dtype: torch.dtype, weights: torch.dtype) -> Seen:
    """Computes in `dtype` with weights rounded to `weights`.

    Raises: CheckpointError when transformers cannot load the folder whole.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=weights, output_loading_info=True)
    except Exception as e:  # transformers raises many kinds
        raise CheckpointError(f"{folder}: transformers cannot load it: {e}") from e
    if loading["missing_keys"] or loading["mismatched_keys"]:
        odd = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))[:8]
        raise CheckpointError(f"{folder}: transformers does not find {', '.join(odd)}")
    model.eval().to(ids_S.device, dtype)
    layers: list[Tensor] = []
    _watch(model.get_decoder().layers, layers, rows=lambda hidden: hidden[0])
    with torch.no_grad():
        logits_SV = model(input_ids=ids_S[None], use_cache=False).logits[0]
    return Seen(layers, logits_SV.float().cpu())


def of_megatron(folder: Path, checkpoint: Path, ids_S: Tensor, *, dtype: str, weights: torch.dtype) -> Seen:
    """Loads the checkpoint strictly into the trainer's model, whose weights are rounded to `weights`.

    Raises: CheckpointError, ConfigError.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.packed_seq_params import PackedSeqParams

    from megabatch.config.model import Model as ModelConfig
    from megabatch.config.recipe import Recipe
    from megabatch.config.run import derived
    from megabatch.converters.families import family_of
    from megabatch.converters.hf_model import read_config
    from megabatch.trainer.model.build import build, ddp_config
    from megabatch.trainer.model.row import row
    from megabatch.trainer.model.transformer_config import transformer_config
    from megabatch.trainer.ranks import Ranks

    config = read_config(folder)
    shape = family_of(config).shape(config)
    plain = Recipe(name="precision", task="sft", model=ModelConfig(model=str(folder), torch_dtype=dtype))  # type: ignore[arg-type]
    recipe = derived(plain, shape=shape, run_dir=Path())
    with Ranks(gpus_per_node=int(ids_S.is_cuda)) as ranks:
        no_overlap = ddp_config(use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False)
        model = build(shape, transformer_config(recipe, shape, virtual_size=None), ranks, no_overlap)
        inner = model.chunks[0].eval()
        try:
            # nested, because megatron-core puts the checkpoint's common state beside what was asked for
            loaded = dist_checkpointing.load({"model": inner.sharded_state_dict()}, str(checkpoint))
            inner.load_state_dict(loaded["model"], strict=True)
        except Exception as e:  # megatron-core and torch raise many kinds
            raise CheckpointError(f"{checkpoint}: cannot be loaded: {e}") from e
        with torch.no_grad():
            for parameter in inner.parameters():
                parameter.copy_(parameter.to(weights))
        layers: list[Tensor] = []
        _watch(inner.decoder.layers, layers, rows=lambda hidden: hidden[:, 0])
        count = len(ids_S)
        bounds = torch.tensor([0, count], dtype=torch.int32, device=ids_S.device)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=count, max_seqlen_kv=count
        )
        positions = torch.arange(count, device=ids_S.device)
        if model.rotary is not None:
            packed = row(bounds.cpu(), device=ids_S.device, rotation=model.rotary(positions))
        with torch.no_grad():
            logits = inner(
                input_ids=ids_S[None],
                position_ids=positions[None],
                attention_mask=None,
                packed_seq_params=packed,
            )
    return Seen(layers, logits[0, :, : shape.vocab_size].float().cpu())


def _watch(layers: Any, into: list[Tensor], *, rows: Callable[[Tensor], Tensor]) -> None:
    """Keeps the hidden states that leave each layer; layers return them alone or first of several."""
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, out: into.append(
                rows(out[0] if isinstance(out, tuple) else out).detach().float().cpu().clone()
            )
        )


def report(found: Seen, expected: Seen, threshold: Threshold) -> tuple[list[str], bool]:
    """Lines of a table, and whether layers and logits pass."""
    if len(found.layers) != len(expected.layers):
        raise CheckpointError(f"ours has {len(found.layers)} layers, transformers' {len(expected.layers)}")
    lines, passed = [f"{'':>8} {'max error':>12} {'mean error':>12} {'max value':>12}"], True
    named = [(f"layer {i}", a, b) for i, (a, b) in enumerate(zip(found.layers, expected.layers, strict=True))]
    for name, ours, theirs in [*named, ("logits", found.logits, expected.logits)]:
        difference = Difference.of(ours, theirs)
        fine = difference.passes(threshold)
        passed &= fine
        numbers = f"{difference.max:>12.3e} {difference.mean:>12.3e} {difference.scale:>12.3e}"
        lines.append(f"{name:>8} {numbers}{'' if fine else '  too large'}")
    return lines, passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 equal to rounding, 1 not, 2 the comparison could not be made."""
    parser = argparse.ArgumentParser(prog="megabatch.trainer.precision", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=THRESHOLDS, default="float32")
    parser.add_argument("--weights", choices=WEIGHTS, help="dtype that the conversion rounded weights to")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    try:
        lines, passed = compare(given.folder, given.checkpoint, given)
    except MegabatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    return 0 if passed else 1


def compare(folder: Path, checkpoint: Path, given: argparse.Namespace) -> tuple[list[str], bool]:
    """The table with a heading and a verdict, and whether both models are equal to rounding."""
    from megabatch.converters.hf_model import read_config
    from megabatch.trainer.megatron_cpu import adapt

    vocabulary = int(read_config(folder)["vocab_size"])
    ids_S = torch.randint(vocabulary, (given.tokens,), generator=torch.Generator().manual_seed(given.seed))
    on_gpu = torch.cuda.is_available()
    ids_S = ids_S.cuda() if on_gpu else ids_S
    dtype, weights = (getattr(torch, name) for name in (given.dtype, given.weights or given.dtype))
    expected = of_transformers(folder, ids_S, dtype=dtype, weights=weights)
    _alone()
    if not on_gpu:
        adapt()
    found = of_megatron(folder, checkpoint, ids_S, dtype=given.dtype, weights=weights)
    threshold = THRESHOLDS[given.dtype]
    lines, passed = report(found, expected, threshold)
    heading = f"transformers on {folder}, megatron-core on {checkpoint}; {given.tokens} tokens in {given.dtype}"
    rule = (
        f"{given.dtype} allows a max error of {threshold.max:g} and a mean one of {threshold.mean:g} of the max value"
    )
    return [heading, *lines, f"{'equal to rounding' if passed else 'NOT EQUAL'}: {rule}"], passed


def _alone() -> None:
    """This process is the only rank: it meets itself at whatever port is free."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


if __name__ == "__main__":
    sys.exit(main())
