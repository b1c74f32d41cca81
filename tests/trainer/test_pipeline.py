"""What pipeline stages keep and exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import recipe, train, write_run


def outputs_kept(run_dir: str) -> set[int]:
    """Trains one rank; sizes of what a stage sent on, as its backward pass finds it."""
    from megatron.core.pipeline_parallel import schedules

    backward, kept = schedules.backward_step, set()

    def noted(inputs: Any, output: Any, grad: Any, *others: Any) -> Any:
        (sent,), (received,) = (x if isinstance(x, list) else [x] for x in (output, grad))
        if received is not None:
            kept.add(sent.data.numel())
        return backward(inputs, output, grad, *others)

    schedules.backward_step = noted
    assert train(run_dir) == 0
    return kept


@pytest.mark.parametrize("vpp", [None, 2])
def test_a_stage_gives_back_what_it_sent_on(vpp: int | None, ranks: RankServer, tmp_path: Path) -> None:
    """Not in the interleaved schedule, which goes on while its sends are under way."""
    parallel = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": vpp}
    made = recipe(tmp_path, "qwen3", parallel=parallel, resources={"tasks_per_node": 2})
    first, last = ranks.run(outputs_kept, world_size=2, run_dir=str(write_run(made, tmp_path / "run")))
    assert first == {1} if vpp is None else min(first | last) > 1
    assert vpp is not None or not last
