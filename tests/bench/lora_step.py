"""One step of LoRA against a full step of ours, and against PEFT's on transformers, on the same model and batches.

All three run in one process and take turns. Ours are whole steps as a run takes them; PEFT's finds its batch in
memory: forward, loss, backward, clipping, AdamW. Before anything is timed, LoRA's two must agree on their first loss.
Run by `run.py`: python tests/bench/lora_step.py FOLDER ANSWER
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from made_runs import LARGE, MEDIUM, SMALL, recipe, write_run
from measure import Figure, answer, median, sized

from megabatch import Model
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.loop import Loop, open_loop
from megabatch.trainer.signals import StopSignal

RANK, ALPHA = 8, 32
CUDA = torch.cuda.is_available()
ROWS, LENGTH = 4, 2048 if CUDA else sized(128, 32)
MODEL: dict[str, Any] = {**LARGE, "num_layers": 8} if CUDA else sized(MEDIUM, SMALL)
DTYPE = torch.bfloat16 if CUDA else torch.float32
WARM_UP, ROUNDS = sized(3, 1), sized(20, 1)
LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measured(folder: Path) -> list[Figure]:
    """Medians over rounds of (LoRA / full) and (LoRA / PEFT), by processor time, on a GPU by elapsed time."""
    base = _base(folder)
    runs = [_run(folder, name, base, tuner) for name, tuner in (("lora", LORA), ("full", {}))]
    with assemble.join_ranks(runs[0]) as ranks:
        loops = [open_loop(run, ranks, StopSignal(), Activity(0))[0] for run in runs]
        batches = _rows(loops[0])
        peft = _peft(base)
        with loops[0].metrics, loops[1].metrics:
            steps = [loop.steps(Progress()) for loop in loops]
            turns: list[Callable[[], Any]] = [
                lambda: next(steps[0]),
                lambda: next(steps[1]),
                lambda: peft(next(batches)),
            ]
            taken = [_round(turns, first=number) for number in range(WARM_UP + ROUNDS)]
    _agree(loops[0], taken[0][2][1])
    times = [[cpu for cpu, _ in one] for one in taken[WARM_UP:]]
    shown = ", ".join(f"{1e3 * median([one[i] for one in times]):.1f} ms {name}" for i, name in enumerate(NAMES))
    return [
        Figure(
            name=f"LoRA step / {name}",
            value=median([one[0] / one[other] for one in times]),
            unit="x",
            target=target,
            note=f"{'elapsed' if CUDA else 'processor'} time: {shown}; median of {len(times)} rounds",
        )
        for name, other, target in (("full step", 1, 0.75), ("PEFT's step", 2, 1.1))
    ]


NAMES = ("LoRA", "full", "PEFT")


def _round(turns: list[Callable[[], Any]], *, first: int) -> list[tuple[float, Any]]:
    """One step of each, the first of them in turn; (seconds, result) by their order in `turns`."""
    taken: list[Any] = [None] * len(turns)
    for offset in range(len(turns)):
        which = (first + offset) % len(turns)
        started = _now()
        result = turns[which]()
        taken[which] = _now() - started, result
    return taken


def _now() -> float:
    """Seconds of work done so far; on a GPU after all that was queued."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _base(folder: Path) -> Path:
    """A random model as transformers saves it, with a tokenizer of bytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megabatch.data.tokens.tokenizer import train_bpe

    size = MODEL
    config = Qwen3Config(
        vocab_size=size["padded_vocab_size"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["ffn_hidden_size"],
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_attention_heads"],
        num_key_value_heads=size["num_query_groups"],
        head_dim=size["kv_channels"],
        max_position_embeddings=max(LENGTH, 256),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(DTYPE).save_pretrained(folder / "base")
    train_bpe(["some text of words"], vocab_size=300, out_dir=folder / "base")
    return folder / "base"


def _run(folder: Path, name: str, base: Path, tuner: dict[str, Any]) -> Any:
    gpu: dict[str, Any] = (
        {"parallel": {"distributed_backend": "nccl"}, "resources": {"gpus_per_node": 1}} if CUDA else {}
    )
    made = recipe(
        folder,
        MODEL,
        data={"max_length": LENGTH},
        batch={"micro_batch_size": ROWS, "global_batch_size": ROWS},
        kernels={"transformer_impl": "local"},
        recompute={"recompute_granularity": "none"},
        tuner=tuner,
        **gpu,
    )
    dtype = str(DTYPE).removeprefix("torch.")
    return write_run(replace(made, model=Model(model=str(base), torch_dtype=dtype)), folder / name)


def _rows(loop: Loop) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The loop's batches as [rows, length] tensors: ids, next tokens, weights."""
    found = []
    for step in itertools.islice(loop.parts.steps.after({}, loop.engine), WARM_UP + ROUNDS):
        (pack,) = step.packs
        assert pack.ids_T.numel() == ROWS * LENGTH, "rows are not equally long"
        found.append(
            tuple(
                x.view(ROWS, LENGTH).to(loop.engine.ranks.device) for x in (pack.ids_T, pack.targets_T, pack.weights_T)
            )
        )
    return iter(found)


def _peft(base: Path) -> Callable[[tuple[torch.Tensor, ...]], float]:
    """A function that takes a step and returns its loss."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=DTYPE, attn_implementation="sdpa")
    model.to("cuda" if CUDA else "cpu")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step(rows: tuple[torch.Tensor, ...]) -> float:
        ids, targets, weights = rows
        logits = adapted(input_ids=ids).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _agree(loop: Loop, theirs: float) -> None:
    """A comparison of two different computations would mean nothing."""
    first = json.loads(loop.metrics.run.metrics.read_text(encoding="utf-8").splitlines()[0])["loss"]
    if abs(first - theirs) > (1e-2 if CUDA else 1e-4) * abs(theirs):
        raise SystemExit(f"the trainer and PEFT differ in their first loss: {first} and {theirs}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir(exist_ok=True)
    answer(measured(Path(sys.argv[1])), sys.argv[2])
