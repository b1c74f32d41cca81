"""Steps of distillation on answers that a model writes in place of the dataset's (arXiv:2306.13649, algorithm 1).

A draw for each step says whose answers it trains on: the student's with probability lmbda, else the teacher's with
seq_kd, else the dataset's. Draws, prompts and seeds follow from the place in the data, and answers from these and from
the weights, so that a run resumes with the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from megabatch.data.cache.in_memory import in_memory
from megabatch.data.packing import pack, singletons
from megabatch.data.rows.files import Origin
from megabatch.data.schedule import Cursor, rng_of
from megabatch.data.tokens.chunk import Chunk
from megabatch.data.tokens.sample import TEACHER_NUMBER, Encoded
from megabatch.ledger.record import Record
from megabatch.ledger.writer import Ledger
from megabatch.rollout.engine import Completion, Request, Sampling
from megabatch.trainer.data.dataset import Dataset
from megabatch.trainer.data.global_batch import GlobalBatch, Share
from megabatch.trainer.engine import Engine
from megabatch.trainer.objectives.gkd import BY_STUDENT, BY_TEACHER
from megabatch.trainer.pack import Pack
from megabatch.trainer.rl.generating import seed_of
from megabatch.trainer.rl.prompts import Language
from megabatch.trainer.steps import State, Step, Steps
from megabatch.trainer.sums import Ratio

Writer = Literal["student", "teacher"]
_COLUMNS: Mapping[Writer, str] = {"student": BY_STUDENT, "teacher": BY_TEACHER}


class Engines(Protocol):
    """The engines with one model's weights (`trainer.sync.rollouts`)."""

    def update(self, engine: Engine, version: int) -> Mapping[str, Ratio]: ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...

    def rest(self, level: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """How answers are written, and how they become rows."""

    lmbda: float
    """Fraction of the steps with the student's answers."""
    student: Engines | None
    """None where lmbda is 0."""
    teacher: Engines | None
    """With the teacher's weights; None without seq_kd."""
    sampling: Sampling
    language: Language
    seed: int
    positions: int
    """Tokens that both models can take."""
    packing_length: int | None
    """Tokens of a pack, where the run packs."""
    sleep_level: int
    share: Share


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, with the prompt of its row."""

    prompt: np.ndarray
    """int32 token ids."""
    completion: Completion
    place: str
    teacher: float | None
    """The number of the row's teacher, where there are several."""

    def encoded(self, column: str) -> Encoded:
        ids = np.concatenate([self.prompt, np.array(self.completion.ids, np.int32)])
        weights: np.ndarray = np.zeros(len(ids), np.float32)
        weights[len(self.prompt) :] = 1.0
        taught = {} if self.teacher is None else {TEACHER_NUMBER: self.teacher}
        return Encoded(ids.astype(np.int32), weights, {column: 1.0, **taught})


@dataclass(kw_only=True)
class WrittenSteps(Steps):
    """The steps of a dataset, some of them with other answers to the same prompts."""

    dataset: Dataset
    writing: Writing
    ledger: Ledger | None
    """On the main rank."""
    _answers: Sequence[Answer] = field(default=(), init=False)
    """Of the newest step that was written."""

    @property
    def train_iters(self) -> int:  # type: ignore[override]
        return self.dataset.train_iters

    @property
    def course(self) -> str:  # type: ignore[override]
        own = f"the student answers in {self.writing.lmbda:.0%} of the steps"
        rest = ", and the teacher in the others" if self.writing.teacher is not None else ""
        return f"{self.dataset.course}; {own}{rest}"

    def require(self, cursor: State) -> None:
        self.dataset.require(cursor)

    def after(self, cursor: State, engine: Engine) -> Iterator[Step]:
        before = Cursor.from_json(cursor)
        for step in self.dataset.after(cursor, engine):
            writer = self.writer(before)
            made = step if writer is None else self._written(step, before, writer, engine)
            share = {"on_policy": Ratio(float(writer == "student"), 1.0)}
            yield replace(made, metrics={**made.metrics, **share})
            before = Cursor.from_json(step.cursor)

    def places(self, pack: Pack) -> Sequence[str]:
        if BY_STUDENT not in pack.columns and BY_TEACHER not in pack.columns:
            return self.dataset.places(pack)
        some = [self._answers[number] for number in pack.columns["number"].tolist()]
        return [f"{one.place} ({one.completion.key})" for one in some]

    def writer(self, place: Cursor) -> Writer | None:
        """Who writes the answers of the step that begins at this place; None: the dataset has them."""
        drawn = rng_of(self.writing.seed, f"writer {place.epoch} {place.offset}").random()
        if drawn < self.writing.lmbda:
            return "student"
        return "teacher" if self.writing.teacher is not None else None

    def _written(self, step: Step, before: Cursor, writer: Writer, engine: Engine) -> Step:
        """A step on the same prompts."""
        writing, number = self.writing, self._steps_before(before)
        engines = writing.student if writer == "student" else writing.teacher
        assert engines is not None, writer
        metrics = dict(engines.update(engine, number)) if writer == "student" else {}
        started = time.perf_counter()
        self._answers = self._answered(engines, before, number + 1)
        metrics["generate_s"] = Ratio(time.perf_counter() - started, 1.0)
        if writer == "student":
            engines.rest(writing.sleep_level)
        if self.ledger is not None:
            self.ledger.write(number + 1, [self._record(one, writer) for one in self._answers])
        made = self._batch(_COLUMNS[writer]).step(writing.share, cursor=step.cursor, epoch=step.epoch)
        return replace(made, metrics=metrics | measured(self._answers))

    def _steps_before(self, place: Cursor) -> int:
        schedule = self.dataset.schedule
        return (place.epoch * len(schedule) + place.offset) // schedule.global_batch_size

    def _answered(self, engines: Engines, before: Cursor, number: int) -> list[Answer]:
        """Answers to the prompts of the global batch that begins at a place. Args: number: of the step."""
        data, schedule = self.dataset.data, self.dataset.schedule
        packs, _ = schedule.next(before)
        samples = np.concatenate([schedule.samples(int(one)) for one in packs]).tolist()
        prompts = [prompt_of(data[index].ids, data[index].weights) for index in samples]
        requests = [self._request(prompt, f"{number}/{place}") for place, prompt in enumerate(prompts)]
        made = zip(prompts, engines.generate(requests), samples, strict=True)
        return [
            Answer(prompt, one, str(data.origin(index)), data[index].columns.get(TEACHER_NUMBER))
            for prompt, one, index in made
        ]

    def _request(self, prompt: np.ndarray, key: str) -> Request:
        """The sample fits in a pack, and in the model, with an answer; so does its prompt, with at least one token."""
        room = min(self.writing.positions, self.writing.packing_length or self.writing.positions) - len(prompt)
        sampling = self.writing.sampling
        return Request(
            key=key,
            prompt=tuple(prompt.tolist()),
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)),
            seed=seed_of(self.writing.seed, key),
        )

    def _batch(self, column: str) -> GlobalBatch:
        chunk = Chunk()
        for number, one in enumerate(self._answers):
            chunk.add([one.encoded(column)], Origin("answers", number, is_line=False))
        data, capacity = in_memory([chunk.arrays()]), self.writing.packing_length
        order = np.arange(len(self._answers))
        packs = singletons(order) if capacity is None else pack(data.lengths, order=order, capacity=capacity)
        some = [packs[number] for number in range(len(packs))]
        return GlobalBatch(data, some, [np.arange(len(one)) for one in some])

    def _record(self, one: Answer, writer: Writer) -> Record:
        language, made = self.writing.language, one.completion
        return Record(
            key=made.key,
            prompt=language.tokenizer.decode(one.prompt.tolist()),
            completion=language.text(made.ids),
            prompt_ids=one.prompt.tolist(),
            ids=made.ids,
            logps=made.logps,
            versions=made.versions,
            mask=[1] * len(made.ids),
            finish=made.finish,
            rewards={},
            reward=None,
            advantage=0.0,
            extra={"place": one.place, "writer": writer},
        )


def prompt_of(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The tokens of a sample before the first that is learned: int32. Args: as of `Sample`."""
    return np.asarray(ids[: int(np.argmax(weights > 0))], np.int32)


def measured(answers: Sequence[Answer]) -> dict[str, Ratio]:
    """Their mean length in tokens, and how many were cut off."""
    count, made = float(len(answers)), [one.completion for one in answers]
    return {
        "completion_length": Ratio(float(sum(len(one.ids) for one in made)), count),
        "cut_off": Ratio(float(sum(one.finish != "stop" for one in made)), count),
    }
