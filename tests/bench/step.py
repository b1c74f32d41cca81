"""One training step of ours against a bare megatron-core loop on the same model and batches.

Both run in one process on the same weights and take turns, so that what else the machine does meets both. Ours is the
whole of a step as a run does it: the batch from the token cache, the optimizer step, metrics.jsonl and TensorBoard.
The bare loop finds its batch in memory and logs nothing. Before anything is timed, both must agree on loss and
gradient norm. Run by `run.py`: python tests/bench/step.py FOLDER ANSWER [CASE …]; without cases all that run here.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bare_loop import BareLoop, Rows
from made_runs import EXPERTS, LARGE, LARGE_EXPERTS, MEDIUM, SMALL, recipe, write_run
from measure import Figure, answer, median, sized

from megabatch import MoE
from megabatch.config.run import RunConfig
from megabatch.entry.estimate import estimate_of
from megabatch.plan.flops import training_flops
from megabatch.plan.gpus import gpu_named
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.loop import Loop, open_loop
from megabatch.trainer.model.transformer_config import transformer_config
from megabatch.trainer.signals import StopSignal
from megabatch.trainer.steps import Step

WARM_UP = sized(3, 1)
TARGET = 1.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    name: str
    model: dict[str, Any]
    experts: MoE | None = None
    max_length: int = 128
    micro_batch_size: int = 4
    pairs: int = 20
    promised: bool = True
    """Whether the ratio has a target; a model so small that only Python is measured has none."""
    fused_attention: bool = True
    """Whether the bare loop's attention is torch's fused kernel or megatron-core's own."""
    impl: str = "local"
    """`kernels.transformer_impl`; the bare loop has megatron-core's local layers, so others are measured alone."""
    tuner: dict[str, Any] = field(default_factory=dict)
    """Fields of `tuner`; the bare loop trains all of the model, so adapters are measured alone."""
    alone: bool = False
    """Whether no bare loop runs beside ours: its memory would not fit."""

    @property
    def has_bare(self) -> bool:
        return self.impl == "local" and not self.tuner and not self.alone


CPU_CASES = (
    Case(name="dense", model=MEDIUM),
    Case(name="dense, one row", model=MEDIUM, micro_batch_size=1),
    Case(name="dense, plain attention", model=MEDIUM, fused_attention=False),
    Case(name="experts", model=MEDIUM, experts=EXPERTS),
    Case(name="small experts", model=SMALL, experts=EXPERTS, promised=False),
)
TOY_CASES = (
    Case(name="dense", model=SMALL, max_length=32),
    Case(name="plain attention, experts", model=SMALL, max_length=32, experts=EXPERTS, fused_attention=False),
)
LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.0}
GPU_CASES = (
    Case(name="dense", model=LARGE, max_length=4096, micro_batch_size=2, pairs=20),
    Case(name="experts", model={**LARGE, "num_layers": 8}, experts=LARGE_EXPERTS, max_length=4096, pairs=15,
         micro_batch_size=2),
    Case(name="small experts", model=SMALL, experts=EXPERTS, promised=False),
    Case(name="long rows", model={**LARGE, "num_layers": 8}, max_length=32768, micro_batch_size=1, alone=True),
    Case(name="LoRA", model=LARGE, max_length=4096, micro_batch_size=2, tuner=LORA),
    Case(name="experts, LoRA", model={**LARGE, "num_layers": 8}, experts=LARGE_EXPERTS, max_length=4096,
         micro_batch_size=2, tuner=LORA),
)  # fmt: skip
TRANSFORMER_ENGINE_CASES = tuple(
    replace(case, name=f"{case.name}, Transformer Engine", impl="transformer_engine")
    for case in GPU_CASES
    if case.promised
)


def compare(case: Case, folder: Path) -> list[Figure]:
    """Median over pairs of steps of (ours / bare)."""
    run = _run(case, folder)
    with assemble.join_ranks(run) as ranks:
        ours, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        if not case.has_bare:
            with ours.metrics:
                return _alone(run, ours, case)
        batches = _rows(ours.parts.steps.after({}, ours.engine), case, ranks.device)
        config = transformer_config(run.recipe, run.shape, virtual_size=None)
        config.use_te_activation_func = False  # megatron-core's own SwiGLU
        bare = BareLoop(
            config,
            run.shape,
            ours.engine.model.chunks[0].state_dict(),
            vocab_size=ours.engine.model.padded_vocab_size,
            fused_attention=case.fused_attention,
            device=ranks.device,
            lr=run.recipe.learning_rate.lr,
        )
        with ours.metrics:
            pairs = _pairs(ours, bare, batches, case)
            bare.free()
            del bare, batches
            alone = _alone(run, ours, case) if ranks.device.type == "cuda" else []
    ours_ms, bare_ms = (1e3 * median([pair[side].wall_s for pair in pairs]) for side in (0, 1))
    return [
        Figure(
            name=f"step / bare, {case.name}",
            value=median([o.wall_s / b.wall_s for o, b in pairs]),
            unit="x",
            target=TARGET if case.promised else None,
            note=f"{ours_ms:.1f} ms ours, {bare_ms:.1f} ms bare; median of {len(pairs)} pairs",
        ),
        Figure(
            name=f"step / bare, {case.name}, processor",
            value=median([o.cpu_s / b.cpu_s for o, b in pairs]),
            unit="x",
            note="the same pairs by processor time",
        ),
        *alone,
    ]


def _alone(run: RunConfig, ours: Loop, case: Case) -> list[Figure]:
    """Our steps on a GPU without the bare loop's model beside them: FLOPs, peak memory, and the plan."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    # the loop's step ahead of time was consumed; the next generator goes on from the state that is there
    steps, count = ours.steps(Progress()), sized(8, 2)
    for _ in range(WARM_UP):
        next(steps)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / count
    tokens = 2 * case.micro_batch_size * case.max_length
    flops = training_flops(run.shape, tokens=tokens, mean_length=case.max_length)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    figures = [
        Figure(name=f"step, {case.name}", value=1e3 * seconds, unit="ms", note=f"{tokens / seconds:,.0f} tokens/s")
    ]
    name = torch.cuda.get_device_name()
    if (gpu := gpu_named(name)) is None:
        return figures
    plan = estimate_of(run.recipe, run.shape, gpu)
    planned = replace(plan.memory, framework=0).total_gib
    reserved = torch.cuda.max_memory_reserved() / 2**30
    if not case.tuner:  # a step of adapters computes no gradients of the weights
        mfu = flops / seconds / gpu.peak_tflops / 1e12
        note = f"{name}, {flops / seconds / 1e12:.0f} TFLOP/s; planned {plan.step.mfu:.3f}"
        figures.append(Figure(name=f"MFU, {case.name}", value=mfu, unit="", note=note))
    return [
        *figures,
        Figure(
            name=f"peak memory / plan, {case.name}",
            value=peak_gib / planned,
            unit="x",
            note=f"{peak_gib:.2f} GiB of tensors, {reserved:.2f} reserved; planned {planned:.2f} and "
            f"{plan.memory.framework / 2**30:.2f} for the framework: {plan.memory}",
        ),
        Figure(
            name=f"step / plan, {case.name}",
            value=seconds / plan.step.total_s,
            unit="x",
            note=f"planned {1e3 * plan.step.total_s:.1f} ms",
        ),
    ]


@dataclass(frozen=True, slots=True)
class _Taken:
    wall_s: float
    cpu_s: float


def _pairs(ours: Loop, bare: BareLoop, batches: Iterator[list[Rows]], case: Case) -> list[tuple[_Taken, _Taken]]:
    steps = ours.steps(Progress())
    pairs = []
    for number in range(WARM_UP + sized(case.pairs, 1)):
        rows = next(batches)
        turns: list[Any] = [lambda: next(steps), lambda rows=rows: bare.step(rows)]
        order = (0, 1) if number % 2 else (1, 0)
        taken: list[Any] = [None, None]
        for turn in order:
            taken[turn] = _timed(turns[turn])
        if number == 0:
            _agree(ours, taken[1][1])
        pairs.append((taken[0][0], taken[1][0]))
    return pairs[WARM_UP:]


def _timed(step: Any) -> tuple[_Taken, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _Taken(time.perf_counter() - wall, time.process_time() - cpu), result


def _agree(ours: Loop, bare: tuple[float, float]) -> None:
    """A comparison of two different computations would mean nothing."""
    first = json.loads(ours.metrics.run.metrics.read_text(encoding="utf-8").splitlines()[0])
    loss, norm = first["loss"], first["grad_norm"]
    tolerance = 1e-2 if ours.engine.model.config.bf16 else 1e-4
    for mine, other, what in ((loss, bare[0], "loss"), (norm, bare[1], "gradient norm")):
        if abs(mine - other) > tolerance * abs(other):
            raise SystemExit(f"the trainer and the bare loop differ in their first {what}: {mine} and {other}")


def _run(case: Case, folder: Path) -> RunConfig:
    cuda = torch.cuda.is_available()
    groups: dict[str, dict[str, Any]] = {
        "data": {"max_length": case.max_length},
        "batch": {"micro_batch_size": case.micro_batch_size, "global_batch_size": 2 * case.micro_batch_size},
        "kernels": {"transformer_impl": case.impl},
        "tuner": case.tuner,
    }
    model = case.model
    if cuda:
        model = {**model, "torch_dtype": "bfloat16"}
        groups |= {"resources": {"gpus_per_node": 1}, "parallel": {"distributed_backend": "nccl"}}
    folder.mkdir()
    return write_run(recipe(folder, model, experts=case.experts, **groups), folder / "run")


def _rows(steps: Iterator[Step], case: Case, device: torch.device) -> Iterator[list[Rows]]:
    """The same batches as [rows, length] tensors, made outside the timed part."""
    shape = (case.micro_batch_size, case.max_length)
    for step in steps:
        packs = [pack.to(device) for pack in step.packs]
        assert all(pack.ids_T.numel() == shape[0] * shape[1] for pack in packs), "rows are not equally long"
        yield [
            (p.ids_T.view(shape), p.positions_T.view(shape), p.targets_T.view(shape), p.weights_T.view(shape))
            for p in packs
        ]


def main(folder: str, path: str, *names: str) -> None:
    torch.set_num_threads(1)
    figures: list[Figure] = []
    cases = sized(CPU_CASES, TOY_CASES)
    if torch.cuda.is_available():
        with_te = importlib.util.find_spec("transformer_engine") is not None
        cases = (*GPU_CASES, *(TRANSFORMER_ENGINE_CASES if with_te else ()))
    cases = tuple(case for case in cases if case.name in names) if names else cases
    for number, case in enumerate(cases):
        figures += compare(case, Path(folder) / str(number))
        answer(figures, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
