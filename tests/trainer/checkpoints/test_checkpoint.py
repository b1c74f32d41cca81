"""Who may write to a run."""

from __future__ import annotations

from pathlib import Path

from rank_server import RankServer
from runs import recipe, train, write_run


def train_or_say(run_dir: str, stop_after: int) -> str:
    from megabatch.errors import CheckpointError

    try:
        return str(train(run_dir, stop_after))
    except CheckpointError as e:
        return str(e)


def test_an_attempt_that_was_given_up_saves_nothing(ranks: RankServer, tmp_path: Path) -> None:
    """Slurm may start a job anew while ranks of a node that it took for dead live on."""
    run = write_run(recipe(tmp_path), tmp_path / "run")
    (run / "jobs.jsonl").write_text(
        '{"job_id": "7", "attempt": 0, "start": 1}\n{"job_id": "7", "attempt": 1, "start": 2}\n'
    )
    [said] = ranks.run(train_or_say, world_size=1, run_dir=str(run), stop_after=1)
    assert said == "attempt 1 has taken over this run; attempt 0 ends"
    assert not list((run / "checkpoints").glob("*"))
