"""Whose answers a step trains on, from which prompts they are written, and how they become rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from megabatch.data.schedule import Cursor
from megabatch.rollout.engine import Completion, Sampling
from megabatch.trainer.data.global_batch import Share
from megabatch.trainer.rl.written import Answer, Writing, WrittenSteps, prompt_of

SAMPLING = Sampling(temperature=1.0, max_tokens=50, stop_ids=(2,))


def steps(*, lmbda: float = 0.3, teacher: Any = None, packing_length: int | None = None) -> WrittenSteps:
    nothing: Any = None
    writing = Writing(
        lmbda=lmbda, student=nothing, teacher=teacher, sampling=SAMPLING, language=nothing, seed=7, positions=40,
        packing_length=packing_length, sleep_level=0, share=Share(),
    )  # fmt: skip
    return WrittenSteps(dataset=nothing, writing=writing, ledger=None)


def answer(prompt: int, length: int) -> Answer:
    ids = tuple(range(length))
    completion = Completion(key="1/0", ids=ids, logps=(0.0,) * length, versions=(0,) * length, finish="length")
    return Answer(np.arange(prompt, dtype=np.int32), completion, "rows.jsonl:1", teacher=None)


def test_a_share_of_the_steps_is_the_students() -> None:
    places = [Cursor(epoch, offset) for epoch in range(10) for offset in range(0, 400, 2)]
    drawn = [steps().writer(place) for place in places]
    assert drawn == [steps().writer(place) for place in places]
    assert abs(drawn.count("student") / len(drawn) - 0.3) < 0.04 and set(drawn) == {"student", None}
    assert {steps(teacher=object()).writer(place) for place in places} == {"student", "teacher"}
    assert {steps(lmbda=0.0).writer(place) for place in places} == {None}
    assert {steps(lmbda=1.0, teacher=object()).writer(place) for place in places} == {"student"}


def test_a_prompt_ends_where_something_is_learned() -> None:
    ids, weights = np.arange(6, dtype=np.int32), np.array([0, 0, 0, 0.5, 0, 1], np.float32)
    assert prompt_of(ids, weights).tolist() == [0, 1, 2]


def test_an_answer_fits_in_the_model_and_in_a_pack() -> None:
    prompt = np.arange(30, dtype=np.int32)
    assert steps()._request(prompt, "1/0").sampling.max_tokens == 10
    assert steps(packing_length=33)._request(prompt, "1/0").sampling.max_tokens == 3
    assert steps()._request(prompt, "1/0").seed != steps()._request(prompt, "1/1").seed


def test_answers_are_packed_anew() -> None:
    one = steps(packing_length=12)
    one._answers = [answer(3, 4), answer(2, 8), answer(2, 3)]
    batch = one._batch("by_student")
    assert [some.tolist() for some in batch.samples] == [[0, 2], [1]]
    assert [some.tolist() for some in batch.items] == [[0, 1], [0]]
    sample = batch.data[1]
    assert sample.ids.tolist() == [0, 1, *range(8)] and sample.weights.tolist() == [0.0, 0.0, *[1.0] * 8]
    assert sample.columns["by_student"] == 1.0
