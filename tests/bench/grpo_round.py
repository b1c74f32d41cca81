"""Parts of a round of GRPO: giving engines the weights, passes for log-probabilities, and what is neither.

- An update of the engine in the rank against a copy of the same tensors in memory.
- What old and reference log-probabilities cost against the training pass over the same completions: the reference's
  pass, what it takes to read the policy's from the training pass of a round's first step, and a pass for those of its
  other steps, where it has some. Or two whole passes, where the policy's are needed beforehand. And all of them where
  completions share their prompt, against what they are where each has it for itself.
- Batching, rewards and ledger of whole steps against those steps.

All by processor time, except that a reward is waited for: its process is another one.
Run by `run.py`: python tests/bench/grpo_round.py FOLDER ANSWER
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from made_runs import MEDIUM, SMALL, WEIGHTY, recipe, write_run
from measure import MIB, Figure, answer, median, sized
from peers import write_problems

from megabatch import Grpo, Rlhf, Rollout
from megabatch.config.run import RunConfig
from megabatch.rl.rounds import Rolled
from megabatch.rollout.local.transformers_engine import TransformersEngine
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.loop import open_loop
from megabatch.trainer.model_source import model_source
from megabatch.trainer.readouts.tokens import Tokens
from megabatch.trainer.rl.batch import Batching
from megabatch.trainer.rl.rolling import MODEL
from megabatch.trainer.signals import StopSignal
from megabatch.trainer.sync.exchange import shared_buckets
from megabatch.trainer.tasks.grpo import batching_of

ROUNDS, PASSES = sized((15, 4), (1, 1))
COMPLETIONS, EACH, LENGTH = sized((64, 8, 96), (16, 4, 8))
STEPS = sized(6, 2)
REWARD = """
def distinct(completions, **columns):
    return [len(set(text.split())) / (1 + len(text.split())) for text in completions]
"""


def made(folder: Path, name: str, model: dict[str, Any], **grpo: Any) -> RunConfig:
    """A run whose prompts are word problems, with a reference."""
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    if not (folder / "train.jsonl").exists():
        write_problems(folder / "train.jsonl")
    run = recipe(
        folder,
        model,
        data={"max_length": 96, "truncation_strategy": "left", "num_workers": 0},
        batch={"micro_batch_size": sized(4, 1), "global_batch_size": COMPLETIONS},
        recompute={"recompute_granularity": "none"},
        kernels={"transformer_impl": "local"},
        rewards={"reward_workers": 1},
        logging={"log_interval": 1},
    )
    run = replace(
        run,
        task="rlhf",
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(num_generations=EACH, reward_funcs=[f"{folder / 'reward.py'}:distinct"], **grpo),
        rollout=Rollout(temperature=1.0, max_completion_length=LENGTH),
    )
    return write_run(run, folder / name)


def update(folder: Path) -> Figure:
    """Of the engine on transformers in one process."""
    run = made(folder, "update", sized(WEIGHTY, SMALL), beta=0.0)
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        rollout = TransformersEngine(source.config_folder, dtype=torch.float32, device=ranks.device)
        table = source.family.tensors(engine.model.shape, experts=rollout.experts)
        tensors = [parameter.detach() for chunk in engine.model.chunks for parameter in chunk.parameters()]
        copies = [torch.empty_like(tensor) for tensor in tensors]

        def send() -> None:
            rollout.begin_update(1)
            for bucket in shared_buckets(engine.model, table, ranks):
                rollout.put(bucket)
            rollout.end_update()

        def copy() -> None:
            for into, tensor in zip(copies, tensors, strict=True):
                into.copy_(tensor)

        pairs = [(cost(send), cost(copy)) for _ in range(ROUNDS + 1)][1:]
        size = sum(tensor.nbytes for tensor in tensors) / MIB
    note = f"{size:.0f} MiB; {shown(pairs)}"
    return Figure(name="weights to the engine / copy in memory", value=ratio(pairs), unit="x", target=2.0, note=note)


def passes(folder: Path) -> list[Figure]:
    """Forward passes over a step's completions and its training pass."""
    run = made(folder, "passes", sized(MEDIUM, SMALL), num_iterations=2)
    with assemble.join_ranks(run) as ranks:
        loop, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        drawn = completions(run)
        shared = batching_of(run, ranks)
        alone = replace(shared, together=1, inferred_together=1, share=replace(shared.share, shares_prompts=False))
        as_training = replace(
            shared, infer_batch_size=shared.share.micro_batch_size, inferred_together=shared.together
        )

        def costs(batching: Batching) -> Costs:
            def inferred(model: str, some: list[Rolled]) -> float:
                return cost(partial(batching.logps, loop.engine, some, Tokens(1.0), model=model))

            later = {steps: inferred("policy", drawn[COMPLETIONS // steps :]) for steps in (2, 4)}
            return Costs(inferred("policy", drawn), inferred(MODEL, drawn), later, *learn(batching))

        def learn(batching: Batching) -> tuple[float, float]:
            """A training pass, and reading log-probabilities from its result."""
            step = batching.step(drawn, cursor={}, epoch=0.0)
            results = []

            def learned() -> None:
                results.append(
                    loop.engine.step(
                        step.packs, loop.parts.objective, totals=step.totals, filled=step.filled, reads=True
                    )
                )

            return cost(learned), cost(lambda: batching.read(loop.engine, step.packs, results[0].read, drawn))

        rounds = [(costs(shared), costs(alone), costs(as_training)) for _ in range(PASSES + 1)][1:]
    found = []
    for name, pairs, target in (
        *(
            (f"old and reference / training pass, {steps} step{'s' * (steps > 1)} a pass",
             [(one.before(steps), one.training) for one, _, _ in rounds], 0.5 if steps < 4 else None)
            for steps in (1, 2, 4)
        ),
        (f"2 steps a pass, with infer_batch_size={as_training.infer_batch_size}",
         [(other.before(2), other.training) for _, _, other in rounds], None),
        ("two whole passes / training pass", [(one.both, one.training) for one, _, _ in rounds], None),
        (f"the same, with infer_batch_size={as_training.infer_batch_size}",
         [(other.both, other.training) for _, _, other in rounds], None),
        ("the same, beside a training pass, each with its prompt",
         [(other.both, each.training) for _, each, other in rounds], None),
        *(
            (f"old and reference / training pass, {steps} step{'s' * (steps > 1)} a pass, each with its prompt",
             [(each.before(steps), each.training) for _, each, _ in rounds], None)
            for steps in (1, 2, 4)
        ),
        ("two whole passes / training pass, each with its prompt",
         [(each.both, each.training) for _, each, _ in rounds], None),
        ("both passes, shared prompts / each with its prompt",
         [(one.both, each.both) for one, each, _ in rounds], None),
        ("training pass, shared prompts / each with its prompt",
         [(one.training, each.training) for one, each, _ in rounds], None),
    ):  # fmt: skip
        rows = f"{shared.together} in a row, infer_batch_size={shared.infer_batch_size} by default"
        note = f"{COMPLETIONS} completions of {LENGTH} tokens, {rows}; {shown(pairs)}"
        found.append(Figure(name=name, value=ratio(pairs), unit="x", target=target, note=note))
    return found


@dataclass(frozen=True, slots=True)
class Costs:
    """Processor seconds for the same completions."""

    policy: float
    """A pass of the policy."""
    reference: float
    later: dict[int, float]
    """A pass of the policy without the completions of the first of so many steps."""
    training: float
    """The training pass."""
    reading: float
    """Reading log-probabilities from it."""

    @property
    def both(self) -> float:
        return self.policy + self.reference

    def before(self, steps: int) -> float:
        """What old and reference log-probabilities take where a pass over a round has so many steps; reading is
        counted whole, though only the first of them is read."""
        return self.reference + self.reading + self.later.get(steps, 0.0)


def completions(run: RunConfig) -> list[Rolled]:
    """Random tokens, as many as a step takes, `EACH` with the same prompt."""
    import numpy as np

    rng = np.random.default_rng(0)
    found = []
    for number in range(COMPLETIONS):
        if number % EACH == 0:
            prompt = rng.integers(3, 300, sized(64, 8)).astype(np.int32)
        logps = np.full(LENGTH, -5.0, np.float32)
        found.append(
            Rolled(
                key=f"0/{number // EACH}/{number % EACH}",
                place="made",
                prompt=prompt,
                ids=rng.integers(3, 300, LENGTH).astype(np.int32),
                versions=np.zeros(LENGTH, np.int32),
                finish="stop",
                rewards=(0.0,),
                advantage=float(rng.normal()),
                tokens={"old": logps, "reference": logps},
            )
        )
    return found


def controller(folder: Path) -> Figure:
    """What the main rank does around engines and model, in whole steps of a run."""
    run = made(folder, "controller", sized(MEDIUM, SMALL))
    with assemble.join_ranks(run) as ranks:
        loop, _ = open_loop(run, ranks, StopSignal(), Activity(0))
        with loop.metrics, timed_parts() as spent:
            steps = loop.steps(Progress())
            next(steps)  # starts the reward's process
            spent.clear()
            started = time.perf_counter()
            for _ in range(STEPS):
                next(steps)
            whole = time.perf_counter() - started
    parts = ", ".join(f"{name} {1e3 * seconds / STEPS:.1f} ms" for name, seconds in spent.items())
    note = f"of steps of {1e3 * whole / STEPS:.0f} ms: {parts}"
    value = sum(spent.values()) / whole
    return Figure(name="batching, rewards and ledger / step", value=value, unit="x", target=0.05, note=note)


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds spent in each part."""
    from megabatch.ledger.writer import Ledger
    from megabatch.rewards.rewards import Rewards
    from megabatch.trainer.rl.steps import GrpoSteps

    spent: dict[str, float] = {}
    kept: list[tuple[Any, str, Any]] = []
    for owner, method, name in (
        (Batching, "_batch", "batching"),
        (Rewards, "of", "rewards"),
        (GrpoSteps, "_record", "records"),
        (Ledger, "write", "ledger"),
    ):
        kept.append((owner, method, getattr(owner, method)))
        setattr(owner, method, _timed(getattr(owner, method), name, spent))
    try:
        yield spent
    finally:
        for owner, method, function in kept:
            setattr(owner, method, function)


def _timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **more: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **more)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
        return result

    return timed


def cost(function: Callable[[], object]) -> float:
    """Processor seconds."""
    started = time.process_time()
    function()
    return time.process_time() - started


def ratio(pairs: list[tuple[float, float]]) -> float:
    return median([one / other for one, other in pairs])


def shown(pairs: list[tuple[float, float]]) -> str:
    ours, theirs = (1e3 * median(list(values)) for values in zip(*pairs, strict=True))
    return f"processor time: {ours:.1f} ms and {theirs:.1f} ms; median of {len(pairs)} rounds"


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir(exist_ok=True)
    where = Path(sys.argv[1])
    answer([update(where), *passes(where), controller(where)], sys.argv[2])
