"""GRPO's defaults that depend on other fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from megabatch.config.grpo import Grpo, Rollout

Scale = Literal["group", "batch", "none", "gdpo"]
Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

_SCALES: dict[str, Scale] = {"grpo": "group", "rloo": "none", "reinforce_plus_plus": "batch"}


def scale_of(grpo: Grpo) -> Scale:
    """`scale_rewards`, or its default for the estimator."""
    return grpo.scale_rewards or _SCALES[grpo.advantage_estimator]


def subtracts_kl(grpo: Grpo) -> bool:
    """Whether the KL term is part of the reward: `kl_in_reward`, or its default for the estimator."""
    if grpo.kl_in_reward is not None:
        return grpo.kl_in_reward
    return grpo.beta > 0 and grpo.advantage_estimator != "grpo" and scale_of(grpo) != "gdpo"


def correction_of(grpo: Grpo, rollout: Rollout) -> Mode | None:
    """`rollout_importance_sampling_mode`, or its default: stale completions are always corrected."""
    return grpo.rollout_importance_sampling_mode or ("token_truncate" if rollout.async_generate else None)


def measures_difference(grpo: Grpo) -> bool:
    """Whether old log-probabilities are compared with the engine's. Args: grpo: `filled`, as below."""
    return grpo.rollout_importance_sampling_mode is not None or grpo.log_rollout_offpolicy_metrics


def needs_old(grpo: Grpo, *, has_dropout: bool) -> bool:
    """Whether old log-probabilities of any completions take a pass of their own."""
    return grpo.steps_per_generation > 1 or needs_old_of_first(grpo, has_dropout=has_dropout)


def needs_old_of_first(grpo: Grpo, *, has_dropout: bool) -> bool:
    """Whether that pass has the completions of a round's first step too. Else the step's own log-probabilities are the
    old ones, since it is on the policy that the round began with."""
    differ = has_dropout and grpo.steps_per_generation * grpo.num_iterations > 1
    return differ or bool(grpo.kl_in_reward) or measures_difference(grpo)


def infers(grpo: Grpo, *, has_dropout: bool, has_frozen: bool) -> bool:
    """Whether any pass only computes log-probabilities: of the policy, or of a reference or teacher in the ranks
    (`has_frozen`)."""
    return has_frozen or grpo.router_replay_mode == "R2" or needs_old(grpo, has_dropout=has_dropout)


def filled(grpo: Grpo, rollout: Rollout, *, global_batch_size: int) -> Grpo:
    """The group with every derived default in place."""
    size = grpo.generation_batch_size or global_batch_size * grpo.steps_per_generation
    return replace(
        grpo,
        scale_rewards=scale_of(grpo),
        kl_in_reward=subtracts_kl(grpo),
        epsilon_high=grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high,
        generation_batch_size=size,
        steps_per_generation=size // global_batch_size,
        rollout_importance_sampling_mode=correction_of(grpo, rollout),
        num_generations_eval=grpo.num_generations_eval or grpo.num_generations,
    )
