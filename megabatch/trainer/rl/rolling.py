"""A round of GRPO: generate, reward, compare, and keep what the steps need of the policy as it is now."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megabatch.config.grpo import Grpo
from megabatch.config.grpo_defaults import measures_difference, needs_old, needs_old_of_first
from megabatch.config.resolved import resolved
from megabatch.data.schedule import Schedule
from megabatch.rl.advantages import Advantages, advantages, kl_in_reward, spreads
from megabatch.rl.corrections import (
    difference,
    effective_sample_size,
    is_corrected,
    log_ratios,
    rollout_weights,
)
from megabatch.rl.rounds import Rolled, Round, Sum
from megabatch.rl.sequences import Sequences
from megabatch.trainer.engine import Engine
from megabatch.trainer.objectives.grpo import CORRECTION, OLD, REFERENCE, SAMPLED, TEACHER
from megabatch.trainer.readouts.tokens import Tokens
from megabatch.trainer.rl.ahead import Draws, Lead
from megabatch.trainer.rl.batch import Batching
from megabatch.trainer.rl.generating import Generator
from megabatch.trainer.rl.prompts import Prompts
from megabatch.trainer.sync.scored import ServedLogps

logger = logging.getLogger(__name__)

MODEL = "reference"
"""Name of the reference in `Engine.infer`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rolling:
    """Makes rounds. Every rank calls it together and gets the same round."""

    grpo: Grpo
    prompts: Prompts
    schedule: Schedule
    """Draws the prompts of a round."""
    generator: Generator
    batching: Batching
    temperature: float
    lead: Lead | None = None
    """With `async_generate`."""
    has_dropout: bool = False
    """Whether a training pass gives other log-probabilities than one without gradients."""
    has_teacher: bool = False
    """Whether there is a model `TEACHER`, whose log-probabilities are part of the advantages."""
    served: Mapping[str, ServedLogps] = field(default_factory=dict)
    """The models behind servers, by the column of their log-probabilities; the engine has the others."""

    def round(self, number: int, draws: Draws, engine: Engine) -> Round:
        """The next round. Raises: RolloutError, RewardError, DataError on every rank."""
        self.generator.give_policy(engine)
        if self.lead is not None:
            draws = self.lead.begin(number, draws)
        completions, draws, sampled = self._generated(number, draws)
        self.generator.rest()
        completions = self._with_logps(completions, engine)
        if number == 0 and REFERENCE in self.served:
            self._compare_with_start(completions)
        completions, differing = self._corrected(completions)
        compared, kl = self._compared(completions)
        completions = [
            replace(one, advantage=float(advantage))
            for one, advantage in zip(completions, compared.advantages_N, strict=True)
        ]
        epoch = draws.epoch(self.schedule)
        metrics = {**sampled, **differing, **kl, **self.generator.take_metrics()}
        if self.lead is not None:
            continued = sum(len(set(one.versions.tolist())) > 1 for one in completions)
            metrics["continued"] = (float(continued), float(len(completions)))
        return Round(number=number, completions=completions, after=draws.to_json(), epoch=epoch, metrics=metrics)

    def go_on(self, number: int, draws: Draws, engine: Engine) -> None:
        """Has the rounds after a resumed one generated. Args: `number`: of the first of them."""
        if self.lead is not None:
            self.generator.give_policy(engine)
            self.lead.begin_again(number, draws)
            self.generator.rest()

    def _generated(self, number: int, draws: Draws) -> tuple[list[Rolled], Draws, dict[str, Sum]]:
        """The round's completions; with `dynamic_sample`, of prompts whose completions differ in reward as far as
        `max_resample_times` more draws find some, filled up with others."""
        each, wanted = self.grpo.num_generations, self.schedule.global_batch_size
        kept: list[list[Rolled]] = []
        equal: list[list[Rolled]] = []
        tries = self.grpo.max_resample_times if self.grpo.dynamic_sample else 0
        for attempt in range(tries + 1):
            begun = self.lead is not None and not attempt
            drawn, draws = (draws.more if attempt else draws.first)(self.prompts, self.schedule)
            name = f"{number}.{attempt}" if attempt else f"{number}"
            made = self.generator.rewarded(self.prompts, drawn, each=each, name=name, begun=begun)
            groups = [made[first : first + each] for first in range(0, len(made), each)]
            differs = (self._advantages(made).spreads_P > 0).tolist()
            kept += [group for group, is_kept in zip(groups, differs, strict=True) if is_kept or not tries]
            equal += [group for group, is_kept in zip(groups, differs, strict=True) if not is_kept and tries]
            if len(kept) >= wanted:
                break
        if len(kept) < wanted:
            logger.warning(
                "round %d: only %d of %d prompts have completions of different rewards after %d draws; lower "
                "generation_batch_size or raise max_resample_times", number, len(kept), wanted, tries + 1,
            )  # fmt: skip
        chosen = [one for group in [*kept, *equal][:wanted] for one in group]
        if not self.has_teacher and all(math.isnan(value) for one in chosen for value in one.rewards):
            names = ", ".join(self.generator.reward_names)
            logger.warning("round %d: no completion has a reward, so nothing is learned from them: %s", number, names)
        metrics = {"prompts_equal": (float(len(equal)), float(len(kept) + len(equal)))} if tries else {}
        return chosen, draws, metrics

    def _with_logps(self, completions: Sequence[Rolled], engine: Engine) -> list[Rolled]:
        """Adds log-probabilities of the policy, the reference and a teacher, where something needs them."""
        found: dict[str, list[np.ndarray]] = {}
        coming = {column: served.begin(completions) for column, served in self.served.items()}
        if self._records_routes:
            both = self.batching.logps_and_routes(engine, completions, Tokens(self.temperature))
            found[OLD] = [logps for logps, _ in both]
            completions = [replace(one, routes=experts) for one, (_, experts) in zip(completions, both, strict=True)]
            self.generator.busy()
        elif self._needs_old:
            completions = self._with_old(completions, engine)
            self.generator.busy()
        if self.grpo.beta > 0 and REFERENCE not in coming:
            found[REFERENCE] = self.batching.logps(engine, completions, Tokens(self.temperature), model=MODEL)
            self.generator.busy()
        if self.lead is not None and self.grpo.off_policy_sequence_mask_delta is not None:
            found[SAMPLED] = [one.tokens["rollout"] for one in completions]
        if self.has_teacher and TEACHER not in coming:
            found[TEACHER] = self.batching.logps(engine, completions, Tokens(self.temperature), model=TEACHER)
            self.generator.busy()
        for column, asked in coming.items():
            with self.generator.timed(f"{column}_s"):
                found[column] = asked.take()
            self.generator.busy()
        return [
            replace(one, tokens={**one.tokens, **{name: values[number] for name, values in found.items()}})
            for number, one in enumerate(completions)
        ]

    def _with_old(self, completions: Sequence[Rolled], engine: Engine) -> list[Rolled]:
        """Adds the policy's log-probabilities; without those of the first step, where it gives them itself. A step has
        whole prompts."""
        first = 0 if self._first_needs_old else len(completions) // self.grpo.steps_per_generation
        logps = self.batching.logps(engine, completions[first:], Tokens(self.temperature))
        later = zip(completions[first:], logps, strict=True)
        return [*completions[:first], *(replace(one, tokens={**one.tokens, OLD: old}) for one, old in later)]

    def _compare_with_start(self, completions: Sequence[Rolled]) -> None:
        """Logs how far the reference behind a server is from the policy of the first round, which is the model that
        the run begins with: what the server was started with is not known otherwise."""
        sampling = self.generator.sampling
        is_whole = sampling.top_p == 1 and sampling.top_k <= 0 and sampling.repetition_penalty == 1
        with_old = [one for one in completions if OLD in one.tokens]
        policy = OLD if with_old else "rollout" if is_whole else None
        if policy is None:
            return
        flat = _Flat.of(with_old or completions)
        apart_T = ((flat.values(policy) - flat.values(REFERENCE)) * flat.mask_T).abs()
        logger.info(
            "the reference's log-probabilities of the first round differ from those of the model that the run begins "
            "with by up to %.2g (mean %.2g): by rounding alone, if the server has the same weights",
            float(apart_T.max()), float(apart_T.sum() / flat.mask_T.sum().clamp(min=1)),
        )  # fmt: skip

    @property
    def _records_routes(self) -> bool:
        """Whether experts are those of the pass of old log-probabilities; with R3 completions have theirs already."""
        return self.grpo.router_replay_mode == "R2"

    @property
    def _needs_old(self) -> bool:
        return needs_old(self.grpo, has_dropout=self.has_dropout)

    @property
    def _first_needs_old(self) -> bool:
        return self._records_routes or needs_old_of_first(self.grpo, has_dropout=self.has_dropout)

    @property
    def keeps_old(self) -> bool:
        """Whether a round's first step gives its completions' old log-probabilities, for the passes over them that
        follow and for the round's file."""
        return self.grpo.steps_per_generation * self.grpo.num_iterations > 1 and not self._first_needs_old

    def _corrected(self, completions: list[Rolled]) -> tuple[list[Rolled], dict[str, Sum]]:
        """Adds the rollout correction; and how far trainer and engine are apart."""
        if not measures_difference(self.grpo):
            return completions, {}
        flat = _Flat.of(completions)
        log_ratio_T = log_ratios(flat.values("old"), flat.values("rollout"), flat.mask_T)
        found = difference(log_ratio_T, flat.mask_T, flat.sequences)
        metrics: dict[str, Sum] = {
            "rollout_kl": (found.kl, 1.0),
            "rollout_k3": (found.k3, 1.0),
            "rollout_chi2_token": (found.chi2_token, 1.0),
            "rollout_chi2_sequence": (found.chi2_sequence, 1.0),
            "rollout_max_difference": (found.largest, 1.0),
        }
        mode, threshold = self.grpo.rollout_importance_sampling_mode, self.grpo.rollout_importance_sampling_threshold
        if mode is None:
            return completions, metrics
        weights_T = rollout_weights(log_ratio_T, flat.mask_T, flat.sequences, mode=mode, threshold=threshold)
        above_T = is_corrected(log_ratio_T, flat.mask_T, flat.sequences, mode=mode, threshold=threshold)
        metrics["rollout_weight"] = (float((weights_T * flat.mask_T).sum()), float(flat.mask_T.sum()))
        metrics["rollout_ess"] = (effective_sample_size(weights_T, flat.mask_T), 1.0)
        metrics["rollout_corrected"] = (float((above_T * flat.mask_T).sum()), float(flat.mask_T.sum()))
        split = flat.split(weights_T)
        return [
            replace(one, tokens={**one.tokens, CORRECTION: weights})
            for one, weights in zip(completions, split, strict=True)
        ], metrics

    def _compared(self, completions: Sequence[Rolled]) -> tuple[Advantages, dict[str, Sum]]:
        if not (self.grpo.kl_in_reward and self.grpo.beta > 0):
            return self._advantages(completions), {}
        flat = _Flat.of(completions)
        kl_N = flat.sequences.sums(kl_in_reward(flat.values(OLD), flat.values(REFERENCE)) * flat.mask_T)
        metrics = {"kl_in_reward": (float(kl_N.sum()), float(len(kl_N)))}
        return self._advantages(completions, kl_N=self.grpo.beta * kl_N), metrics

    def _advantages(self, completions: Sequence[Rolled], *, kl_N: Tensor | None = None) -> Advantages:
        rewards_NR = torch.tensor([one.rewards for one in completions], dtype=torch.float64)
        weights = self.grpo.reward_weights or [1.0] * rewards_NR.shape[1]
        return advantages(
            rewards_NR,
            torch.tensor(weights, dtype=torch.float64),
            num_generations=self.grpo.num_generations,
            estimator=self.grpo.advantage_estimator,
            scale=resolved(self.grpo.scale_rewards),
            kl_N=kl_N,
        )


@dataclass(frozen=True, slots=True)
class _Flat:
    """All completions' tokens in one row; a completion without any counts as a sequence of none."""

    completions: Sequence[Rolled]
    sequences: Sequences
    mask_T: Tensor

    @classmethod
    def of(cls, completions: Sequence[Rolled]) -> _Flat:
        lengths = torch.tensor([len(one.ids) for one in completions])
        segments_T = torch.arange(len(lengths)).repeat_interleave(lengths)
        return cls(
            completions,
            Sequences.on_one_rank(segments_T, len(lengths)),
            torch.from_numpy(np.concatenate([one.mask for one in completions])),
        )

    def values(self, name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([one.tokens[name] for one in self.completions]))

    def split(self, values_T: Tensor) -> list[np.ndarray]:
        ends = np.cumsum([len(one.ids) for one in self.completions])[:-1]
        return np.split(values_T.numpy(), ends)


def measured(
    completions: Sequence[Rolled], names: Sequence[str], weights: Sequence[float], *, each: int, trained: int
) -> Mapping[str, Sum]:
    """Metrics of the completions of one step or evaluation. Args: `trained`: version of the policy now."""
    rewards_NR = np.array([one.rewards for one in completions], np.float64).reshape(len(completions), len(names))
    known_N = ~np.isnan(rewards_NR).all(1)
    totals_N = np.where(known_N, np.nan_to_num(rewards_NR) @ np.array(weights, np.float64), np.nan)
    spreads_P = spreads(torch.from_numpy(totals_N).view(-1, each)).tolist()
    lengths = [float(len(one.ids)) for one in completions]
    behind = [trained - float(one.versions.min(initial=trained)) for one in completions]
    count = float(len(completions))
    found: dict[str, Sum] = {
        "reward": _sum(totals_N),
        "reward_std": (sum(spreads_P), float(len(spreads_P))),
        "reward_equal": (float(sum(spread == 0 for spread in spreads_P)), float(len(spreads_P))),
        **{f"reward_{name}": _sum(rewards_NR[:, k]) for k, name in enumerate(names)},
        "advantage": (sum(abs(one.advantage) for one in completions), count),
        "completion_length": (sum(lengths), count),
        "completion_length_max": (max(lengths), 1.0),
        "cut_off": (float(sum(one.is_cut_off for one in completions)), count),
        "staleness": (sum(behind), count),
        "staleness_max": (max(behind), 1.0),
    }
    return found


def _sum(values: np.ndarray) -> Sum:
    return float(np.nansum(values)), float((~np.isnan(values)).sum())
