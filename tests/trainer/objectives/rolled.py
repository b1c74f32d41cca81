"""Fixed completions for engines: losses and gradient norms of one step on them, for many settings in one world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megabatch.config.grpo import Grpo
from megabatch.config.run import RunConfig
from megabatch.rl.rounds import Rolled

if TYPE_CHECKING:
    from megabatch.trainer.data.global_batch import Share
    from megabatch.trainer.rl.batch import Batching

GROUP, PROMPTS, LONGEST = 4, 4, 14
TEMPERATURE = 0.8

VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo_sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "grpo_far": {"loss_type": "grpo", "importance_sampling_level": "sequence_token",
                 "off_policy_sequence_mask_delta": 0.05},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo_bounded": {"loss_type": "dr_grpo", "delta": 1.5},
    "dapo_entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.3},
    "dapo_corrected": {"loss_type": "dapo", "log_entropy": True},
    "cispo_overlong": {"loss_type": "cispo", "epsilon_high": 2.0, "overlong_filter": True},
    "sapo_sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "fipo": {"loss_type": "fipo", "delta": 1.9},
    "real": {"loss_type": "real"},
    "dapo_teacher": {"loss_type": "dapo", "teacher_kl_coef": 0.7},
}  # fmt: skip


def settings(variant: str) -> Grpo:
    return Grpo(**{"num_generations": GROUP, "kl_in_reward": False, "beta": 0.1, "epsilon_high": 0.25,
                   **VARIANTS[variant]})  # fmt: skip


def rolled(vocab: int, *, corrected: bool, taught: bool = False) -> list[Rolled]:
    """The same on every rank; all but corrections are noise that `near` adds to log-probabilities."""
    rng = np.random.default_rng(5)
    made = []
    for number in range(GROUP * PROMPTS):
        if number % GROUP == 0:
            prompt = rng.integers(3, vocab, rng.integers(1, 9)).astype(np.int32)
        length = int(rng.integers(1, LONGEST + 1))
        tokens = {name: rng.normal(0, 0.4, length).astype(np.float32) for name in ("old", "reference")}
        correction = rng.lognormal(0, 0.5, length).astype(np.float32)
        teacher = np.sin(np.arange(length, dtype=np.float32) + number)
        made.append(
            Rolled(
                key=f"0/{number // GROUP}/{number % GROUP}",
                place="made",
                prompt=prompt,
                ids=rng.integers(3, vocab, length).astype(np.int32),
                versions=np.zeros(length, np.int32),
                finish="length" if number % 5 == 0 else "stop",
                rewards=(float(rng.integers(0, 2)),),
                advantage=float(rng.normal()),
                tokens={
                    **tokens,
                    **({"correction": correction} if corrected else {}),
                    **({"teacher": teacher} if taught else {}),
                },
            )
        )
    return made


def near(some: list[Rolled], logps: list[Any]) -> list[Rolled]:
    """With old and reference log-probabilities that are `logps` and noise."""
    return [
        replace(one, tokens={
            name: (values + np.asarray(own, np.float32)).astype(np.float32) if name != "correction" else values
            for name, values in one.tokens.items()
        })
        for one, own in zip(some, logps, strict=True)
    ]  # fmt: skip


def measured(
    run_dir: str, variants: list[str], logps: Any = None, together: int = 1
) -> tuple[dict[str, Any], Any, Any]:
    """On each rank: (loss, gradient norm, metrics) of each variant; the policy's log-probabilities; and on a world of
    one rank, by variant, the weights and the gradients by Hugging Face's names."""
    from megabatch.trainer import assemble
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.data.dataset import share_of
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.objectives.grpo import GrpoObjective
    from megabatch.trainer.readouts.tokens import Tokens
    from megabatch.trainer.signals import StopSignal

    run = RunConfig.load(Path(run_dir) / "run.json")
    found: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    with assemble.join_ranks(run) as ranks:
        loop, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        engine, vocab = loop.engine, run.shape.vocab_size
        share = replace(share_of(run, ranks), shares_prompts=together > 1)
        plain = rolled(vocab, corrected=False)
        plain_batching = batching_of(share, together=together)
        own = plain_batching.logps(engine, plain, Tokens(TEMPERATURE))
        weights = (
            _by_name(engine, ranks, run)
            if ranks.place.world_size == 1 and run.recipe.tuner.tuner_type == "full"
            else None
        )
        for variant in variants:
            grpo = settings(variant)
            taught = variant.endswith("teacher")
            made = rolled(vocab, corrected=variant.endswith("corrected"), taught=taught)
            some = near(made, own if logps is None else logps)
            batching = batching_of(
                share,
                group=GROUP if grpo.loss_type == "real" else 1,
                together=together,
                filters_cut_off=grpo.overlong_filter,
            )
            step = batching.step(some, cursor={}, epoch=0.0)
            result = engine.step(
                step.packs,
                GrpoObjective(grpo, temperature=TEMPERATURE, max_completion_length=LONGEST, has_teacher=taught),
                totals=step.totals,
                filled=step.filled,
                accept=lambda measured: False,
            )
            metrics = {name: (ratio.total, ratio.count) for name, ratio in result.metrics.items()}
            found[variant] = (result.metrics["loss"].value, result.grad_norm, metrics)
            if weights is not None:
                gradients[variant] = _gradients(engine, ranks, run)
    return found, [values.tolist() for values in own], (weights, gradients) if weights is not None else None


def inferred(run_dir: str, cases: dict[str, tuple[int, int]]) -> dict[str, tuple[list[Any], int, int]]:
    """On each rank, of each case (completions of a micro-batch without gradients, and of a prompt that share a row):
    the policy's log-probabilities, this rank's micro-batches that hold some, and their tokens."""
    from megabatch.trainer import assemble
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.data.dataset import share_of
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.readouts.tokens import Tokens
    from megabatch.trainer.signals import StopSignal

    run = RunConfig.load(Path(run_dir) / "run.json")
    found = {}
    with assemble.join_ranks(run) as ranks:
        loop, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        engine, infer = loop.engine, loop.engine.infer
        given: list[Any] = []

        def watched(packs: Any, *rest: Any, **named: Any) -> Any:
            given[:] = [pack for pack in packs if pack.sequences]
            return infer(packs, *rest, **named)

        engine.infer = watched  # type: ignore[method-assign]
        for case, (size, together) in cases.items():
            share = replace(share_of(run, ranks), shares_prompts=together > 1)
            batching = batching_of(share, infer_batch_size=size, inferred_together=together)
            logps = batching.logps(engine, rolled(run.shape.vocab_size, corrected=False), Tokens(TEMPERATURE))
            tokens = sum(int(pack.cu_seqlens_padded[pack.sequences]) for pack in given)
            found[case] = ([values.tolist() for values in logps], len(given), tokens)
    return found


def batching_of(
    share: Share, *, together: int = 1, infer_batch_size: int | None = None, inferred_together: int | None = None,
    group: int = 1, filters_cut_off: bool = False,
) -> Batching:  # fmt: skip
    """Passes without gradients are as the steps are, if nothing else is said."""
    from megabatch.trainer.rl.batch import Batching

    return Batching(
        share=share,
        group=group,
        together=together,
        infer_batch_size=infer_batch_size or share.micro_batch_size,
        inferred_together=inferred_together or together,
        filters_cut_off=filters_cut_off,
    )


def _by_name(engine: Any, ranks: Any, run: Any) -> dict[str, np.ndarray]:
    """fp32 tensors of the model by Hugging Face's names."""
    from megabatch.converters.bijection import invert
    from megabatch.converters.families import family_named
    from megabatch.trainer.weights import export

    table = family_named(run.shape.model_type).tensors(run.shape)
    shapes = invert(table)
    found = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for _, rows in export(engine.model, table, ranks):
        for row in rows:
            target = found[row.hf] if row.index is None else found[row.hf][row.index]
            values = np.frombuffer(row.data, np.float32).reshape(-1, *target.shape[1:])
            target[row.row_start : row.row_start + len(values)] = values
    return found


def _gradients(engine: Any, ranks: Any, run: Any) -> dict[str, np.ndarray]:
    """The gradients of the last step, which are exported in the place of the weights."""
    import torch

    parameters = [one for chunk in engine.model.chunks for one in chunk.parameters() if one.requires_grad]
    kept = [one.detach().clone() for one in parameters]
    with torch.no_grad():
        for one in parameters:
            one.copy_(one.main_grad)
        found = _by_name(engine, ranks, run)
        for one, values in zip(parameters, kept, strict=True):
            one.copy_(values)
    return found
