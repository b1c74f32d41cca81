"""Random faults in a row against one run, which comes out of them by itself exactly as the one that nobody disturbed.

pytest tests/end_to_end/test_faults.py -s --faults 20 --faults_seed 3
"""

from __future__ import annotations

import random

import pytest

from megabatch.slurm.queue import State
from megabatch.slurm.records import read_records

from . import faults
from .conftest import STEPS, NewTraining, Training

pytestmark = pytest.mark.slurm

FEW = 4


@pytest.mark.timeout(3600)
def test_random_faults_in_a_row(
    new_training: NewTraining, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    number, seed = request.config.getoption("faults") or FEW, request.config.getoption("faults_seed")
    random.seed(seed)
    steps = STEPS if number == FEW else 15 * number
    if number == FEW:
        uninterrupted: Training = request.getfixturevalue("uninterrupted")
    else:
        uninterrupted = new_training("uninterrupted", train_iters=steps)
        uninterrupted.wait(State.COMPLETED, timeout_s=600)
    planned = faults.plan(number, steps=steps, seed=seed)
    hangs = any(kind == "hung rank" for _, kind in planned)
    patience = {"hang_timeout_min": 0.5} if hangs else {}
    training = new_training("faults", on=None, train_iters=steps, save_interval=5, save_total_limit=2, **patience)
    struck = faults.run_through(training, planned)
    training.wait(State.COMPLETED, timeout_s=300)
    with capsys.disabled():
        again = len(training.steps()) - steps
        lines = [f"  {fault.kind:18} at step {fault.step:4}, back after {fault.back_s:5.1f} s" for fault in struck]
        print(f"\n{number} faults, seed {seed}: {steps} steps, {again} of them done again", *lines, sep="\n")
    assert len(read_records(training.files)) == 1, "the same job all along"
    assert training.curves()["train"] == uninterrupted.curves()["train"]
    assert training.exported(steps) == uninterrupted.exported(steps)
