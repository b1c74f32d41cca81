"""A loss or gradient that is no number ends the run on every rank before it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_run


def poisoned(run_dir: str, what: str) -> str:
    """The error of a rank; the last rank's third micro-batch spoils its loss, or its gradient alone."""
    import torch
    import torch.distributed as dist

    from megabatch.errors import MegabatchError
    from megabatch.trainer.objectives.objective import Mean, Terms
    from megabatch.trainer.objectives.sft import Sft

    real, done = Sft.terms, 0

    def terms(objective: Sft, out: Any, pack: Any) -> Terms:
        nonlocal done
        found = real(objective, out, pack)
        done += torch.is_grad_enabled()
        if done != 3 or dist.get_rank() + 1 != dist.get_world_size():
            return found
        if what == "gradient":  # 0, with a slope of 0 * inf
            return Terms(found.numerator + (0 * found.numerator).sqrt(), found.weight, found.metrics)
        loss = found.metrics["loss"]
        return Terms(found.numerator, found.weight, {"loss": Mean(loss.total * torch.nan, loss.count)})

    Sft.terms = terms  # type: ignore[method-assign]
    try:
        train(run_dir)
    except MegabatchError as e:
        return str(e)
    return ""


@pytest.mark.parametrize(("what", "clip_grad"), [("loss", 1.0), ("gradient", 1.0), ("gradient", 0.0)])
def test_the_run_ends_before_it_saves(what: str, clip_grad: float, ranks: RankServer, tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        "qwen3",
        batch={"global_batch_size": 2},
        optimizer={"clip_grad": clip_grad},
        checkpoint={"save_interval": 1},
        resources={"tasks_per_node": 2},
    )
    run = write_run(made, tmp_path / "run")
    for error in ranks.run(poisoned, world_size=2, run_dir=str(run), what=what):
        assert error.startswith("step 3: ") and "nan" in error
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000001", "step_00000002"]
    assert [line["step"] for line in metrics(run)] == [1, 2]
