"""Batch arithmetic: accumulation, steps, GRPO's rounds of generation, and the nearest numbers that would divide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megabatch.values import dataclass

if TYPE_CHECKING:
    from fractions import Fraction


def nearest_multiples(value: int, *, of: int) -> tuple[int, ...]:
    """The positive multiples of `of` closest to `value`, nearest first: one if `value` is one, else up to two."""
    below = value // of * of
    if below == value and value > 0:
        return (value,)
    around = [multiple for multiple in (below, below + of) if multiple > 0]
    return tuple(sorted(around, key=lambda multiple: abs(multiple - value)))


def nearest_divisors(value: int, *, of: int, count: int = 2) -> tuple[int, ...]:
    """The divisors of `of` closest to `value`, nearest first, without `value` itself."""
    divisors = [divisor for divisor in range(1, of + 1) if of % divisor == 0 and divisor != value]
    return tuple(sorted(divisors, key=lambda divisor: abs(divisor - value))[:count])


def train_iters(samples: int, *, epochs: int, global_batch_size: int) -> int:
    """Optimizer steps of `epochs` passes over `samples` items (samples, or packs when packing).

    A batch may span two epochs; the remainder after the last full batch is dropped: `samples · epochs mod
    global_batch_size` items. Source: Megatron-SWIFT counts `train_iters` in the same way.
    """
    return samples * epochs // global_batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoBatch:
    """The numbers of one GRPO round; sizes count completions. Fractions show sizes that do not divide."""

    global_batch_size: int
    micro_batch_size: int
    dp: int
    num_generations: int
    steps_per_generation: int
    generation_batch_size: int

    @property
    def num_rollout_prompts(self) -> Fraction:
        """Prompts of a round of generation."""
        return _fraction(self.generation_batch_size, self.num_generations)

    @property
    def num_train_prompts(self) -> Fraction:
        """Prompts of an optimizer step."""
        return _fraction(self.global_batch_size, self.num_generations)

    @property
    def num_prompts_per_dp_group(self) -> Fraction:
        """Prompts of an optimizer step on each data parallel rank: must be a multiple of `micro_batch_size`."""
        return self.num_train_prompts / self.dp


def _fraction(above: int, below: int) -> Fraction:
    from fractions import Fraction  # takes long to import, and launches of other tasks need none

    return Fraction(above, below)


def grpo_batch(
    *,
    global_batch_size: int,
    micro_batch_size: int,
    dp: int,
    num_generations: int,
    steps_per_generation: int = 1,
    generation_batch_size: int | None = None,
) -> GrpoBatch:
    """GRPO's numbers, with `generation_batch_size = global_batch_size * steps_per_generation` unless it is given."""
    return GrpoBatch(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp=dp,
        num_generations=num_generations,
        steps_per_generation=steps_per_generation,
        generation_batch_size=generation_batch_size or global_batch_size * steps_per_generation,
    )
