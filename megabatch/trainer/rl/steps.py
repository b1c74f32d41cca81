"""GRPO's optimizer steps: rounds, made when the steps before them are done, cut into steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megabatch.errors import DataError
from megabatch.ledger.record import Record
from megabatch.ledger.writer import Ledger
from megabatch.rl.rounds import Rolled, Round
from megabatch.trainer.engine import Engine
from megabatch.trainer.objectives.grpo import OLD
from megabatch.trainer.pack import Pack
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.rl.ahead import Draws
from megabatch.trainer.rl.batch import LEARNED_WITH
from megabatch.trainer.rl.recorded import routes_of
from megabatch.trainer.rl.rolling import Rolling, measured
from megabatch.trainer.steps import State, Step, Steps
from megabatch.trainer.sums import Ratio


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run resumes; saved in checkpoints."""

    prompts: Draws
    """Where the next rounds draw their prompts."""
    round: int = 0
    """Number of the round to make, or to go on with."""
    taken: int = 0
    """Steps taken of it."""
    trained: int = 0
    """Steps of the run: the version of the policy."""
    form: str = ""
    """What the numbers above refer to; "" at the start of a run."""

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("round", "taken", "trained", "form")}
        return {"prompts": self.prompts.to_json(), **fields}

    @classmethod
    def from_json(cls, saved: State) -> Place:
        """`{}` is the start of a run. Raises: DataError when `saved` is no such place."""
        if not saved:
            return cls(Draws())
        try:
            number, taken, trained = (int(saved[name]) for name in ("round", "taken", "trained"))
            return cls(Draws.from_json(saved["prompts"]), number, taken, trained, str(saved["form"]))
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(
                f"the checkpoint's cursor {dict(saved)!r} is no place in GRPO's rounds ({e}); start over with "
                "checkpoint.finetune=True"
            ) from e


class GrpoSteps(Steps):
    """Each round is `num_iterations` passes over its completions, of `steps` steps each."""

    def __init__(
        self,
        rolling: Rolling,
        ranks: Ranks,
        *,
        folder: Path,
        rounds_of_checkpoints: Callable[[], Collection[int]],
        ledger: Ledger | None,
        train_iters: int,
        global_batch_size: int,
    ) -> None:
        """Args: `folder`: of the files of rounds that several steps are taken on; `rounds_of_checkpoints`: the rounds
        that the run's checkpoints may go on with; `ledger`: of all completions, None on ranks other than the main one.
        """
        self._rolling, self._ranks, self._folder = rolling, ranks, folder
        self._rounds_of_checkpoints, self._ledger = rounds_of_checkpoints, ledger
        self._size = global_batch_size
        self._round: Round | None = None
        self.train_iters = train_iters
        grpo = rolling.grpo
        self._each_pass = rolling.schedule.global_batch_size * grpo.num_generations // global_batch_size
        self._each_round = self._each_pass * grpo.num_iterations
        self._form = f"{rolling.schedule.global_batch_size}x{grpo.num_generations}/{self._each_round}"
        self.course = (
            f"each round draws {rolling.schedule.global_batch_size} of {len(rolling.prompts):,} prompts, "
            f"{grpo.num_generations} completions each, for {self._each_round} steps"
        )

    def require(self, cursor: State) -> None:
        place = Place.from_json(cursor)
        for one in (place.prompts.next, *place.prompts.begun):
            self._rolling.schedule.require_own(one)
        if place.form and (place.taken or place.prompts.begun) and place.form != self._form:
            raise DataError(
                f"the checkpoint was saved within a round of {place.form} (prompts x completions / steps), and this "
                f"run's are {self._form}; resume with the settings of the run that wrote it, or start over with "
                "checkpoint.finetune=True"
            )

    def after(self, cursor: State, engine: Engine) -> Iterator[Step]:
        place = Place.from_json(cursor)
        try:
            while True:
                self._rolling.generator.policy.trained = place.trained
                self._round = self._round_at(place, engine)
                for number in range(place.taken, self._each_round):
                    current = self._round
                    step = self._step(current, number, place, engine)
                    yield step
                    place = Place.from_json(step.cursor)
                    self._rolling.generator.policy.trained = place.trained
        finally:
            self._rolling.generator.rollouts.hold()

    def places(self, pack: Pack) -> Sequence[str]:
        if self._round is None:
            return ()
        some = self._round.completions
        return [f"{some[number].place} ({some[number].key})" for number in pack.columns["number"].tolist()]

    def _round_at(self, place: Place, engine: Engine) -> Round:
        if place.taken:
            found = self._ranks.on_main(lambda: Round.load(self._file(place.round)))
            self._rolling.go_on(place.round + 1, place.prompts, engine)
            return found
        made = self._rolling.round(place.round, place.prompts, engine)
        if self._each_round > 1 and not self._rolling.keeps_old:
            self._keep_on_main(made)
        return made

    def _keep_on_main(self, made: Round) -> None:
        self._ranks.on_main(lambda: self._keep(made))

    def _keep(self, made: Round) -> None:
        """Writes a round, and removes those before the last that no checkpoint goes on with."""
        made.save(self._file(made.number))
        wanted = {self._file(number) for number in (made.number, made.number - 1, *self._rounds_of_checkpoints())}
        for file in set(self._folder.glob("round_*.npz")) - wanted:
            file.unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"round_{number:08d}.npz"

    def _step(self, current: Round, number: int, place: Place, engine: Engine) -> Step:
        ends = number + 1 == self._each_round
        after = Place(
            Draws.from_json(current.after),
            current.number + ends,
            0 if ends else number + 1,
            place.trained + 1,
            self._form,
        )
        first = number % self._each_pass * self._size
        some = current.completions[first : first + self._size]
        if self._ledger is not None:
            self._ledger.write(place.trained + 1, [self._record(one) for one in some])
        step = self._rolling.batching.step(some, cursor=after.to_json(), epoch=current.epoch)
        step = replace(step, metrics=self._metrics(current, first, number, trained=place.trained))
        if number or not self._rolling.keeps_old:
            return step
        return replace(step, take=lambda found: self._keep_old(current, step, found, engine))

    def _keep_old(self, current: Round, step: Step, found: Sequence[Mapping[str, Tensor]], engine: Engine) -> None:
        """Args: step: the first on the round; found: log-probabilities of the policy before it."""
        some, others = current.completions[: self._size], current.completions[self._size :]
        logps = self._rolling.batching.read(engine, step.packs, found, some)
        known = [replace(one, tokens={**one.tokens, OLD: old}) for one, old in zip(some, logps, strict=True)]
        self._round = replace(current, completions=[*known, *others])
        self._keep_on_main(self._round)

    def _record(self, one: Rolled) -> Record:
        generator, rolling = self._rolling.generator, self._rolling
        weights = rolling.grpo.reward_weights or [1.0] * len(one.rewards)
        known = [weight * value for weight, value in zip(weights, one.rewards, strict=True) if not math.isnan(value)]
        learned = not (rolling.batching.filters_cut_off and one.is_cut_off)
        return Record(
            key=one.key,
            prompt=generator.language.tokenizer.decode(one.prompt.tolist()),
            completion=generator.language.text(one.ids.tolist()),
            prompt_ids=one.prompt.tolist(),
            ids=one.ids.tolist(),
            logps=one.tokens["rollout"].tolist(),
            versions=one.versions.tolist(),
            mask=[int(learned and part) for part in one.mask.tolist()],
            finish=one.finish,
            rewards=dict(zip(generator.reward_names, one.rewards, strict=True)),
            reward=sum(known) if known else None,
            advantage=one.advantage,
            columns={name: one.tokens[name].tolist() for name in LEARNED_WITH if name in one.tokens},
            extra={"place": one.place},
            routes=routes_of(one),
        )

    def _metrics(self, current: Round, first: int, number: int, *, trained: int) -> Mapping[str, Ratio]:
        """Of the step's completions; with the first step of a round, of the round."""
        generator, grpo = self._rolling.generator, self._rolling.grpo
        names = generator.reward_names
        weights = grpo.reward_weights or [1.0] * len(names)
        some = current.completions[first : first + self._size]
        found = dict(measured(some, names, weights, each=grpo.num_generations, trained=trained))
        if number == 0:
            found |= current.metrics
        return {name: Ratio(*sums) for name, sums in found.items()}
