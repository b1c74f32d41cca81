"""On CPUs nothing is compiled, and ranks start without what they do not use; what runs instead computes the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from rank_server import RankServer, place

from megabatch.slurm.ports import free_port_block

_RANK = """
import gc, os, sys
from pathlib import Path
from megabatch.trainer.main import main
status = main(sys.argv[1:2])
Path(sys.argv[2]).write_text("\\n".join(name for name, module in sys.modules.items() if module is not None))
Path(sys.argv[2] + ".gc").write_text(f"{gc.isenabled()} {gc.get_freeze_count()}")
os._exit(status)
"""
UNUSED = ("torch._dynamo", "torch._inductor", "transformers.generation.utils", "sklearn", "pandas", "pyarrow", "wandb")
OPTIMIZERS = ("Adam", "AdamW", "SGD")


def test_ranks_import_neither_the_compiler_nor_other_heavy_modules(tmp_path: Path) -> None:
    """Two processes, as a launcher starts them, from the start over steps and evaluations to a checkpoint."""
    made = runs.recipe(
        tmp_path,
        training={"train_iters": 2},
        recompute={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        parallel={"distributed_backend": "gloo", "use_distributed_optimizer": True},
        resources={"tasks_per_node": 2},
    )
    run_dir = runs.write_run(made, tmp_path / "run")
    port, ranks = free_port_block(), []
    for rank in range(2):
        environment = {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", **place(rank, 2, port, cuda=False)}
        command = [sys.executable, "-c", _RANK, str(run_dir), str(tmp_path / f"modules_{rank}")]
        ranks.append(subprocess.Popen(command, env={**os.environ, **environment}))
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert list((run_dir / "checkpoints").glob("step_*2"))
    first, second = (set((tmp_path / f"modules_{rank}").read_text().split()) for rank in range(2))
    assert "torch.optim.adam" in first & second and "transformers" in first
    assert not (first | second) & set(UNUSED)
    assert "torch.utils.tensorboard" in first - second, "only the rank that logs needs the writer"
    searches, left_out = (tmp_path / "modules_0.gc").read_text().split()
    assert searches == "True" and int(left_out) > 100_000, "what was imported is not searched for garbage again"


def compiled() -> tuple[list[float], int]:
    """What a function gives that user code compiles, and how often a compiler got it."""
    asked: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        asked.append(inputs)
        return graph.forward  # type: ignore[no-any-return]

    @torch.compile(backend=backend)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    return doubled(torch.tensor([1.0, 2.0])).tolist(), len(asked)


def test_what_user_code_compiles_runs_as_written(ranks: RankServer) -> None:
    assert ranks.run(compiled, world_size=1) == [([2.0, 4.0], 0)]


def stepped(names: tuple[str, ...]) -> dict[str, list[torch.Tensor]]:
    """Weights after three steps of each optimizer, with a closure, and the state that a second one takes over."""
    found = {}
    for name in names:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        made = getattr(torch.optim, name)([weight], lr=0.1, weight_decay=0.01)

        def loss(weight: torch.Tensor = weight, made: Any = made) -> torch.Tensor:
            made.zero_grad()
            value = (weight**3).sum()
            value.backward()
            return value

        values = [made.step(loss).detach() for _ in range(3)]
        other = getattr(torch.optim, name)([weight], lr=0.2)
        other.load_state_dict(made.state_dict())
        other.step(loss)
        found[name] = [weight.detach(), *values, torch.tensor(weight.requires_grad and weight.is_leaf)]
    return found


@pytest.mark.filterwarnings("ignore")
def test_optimizers_step_as_torchs_own_do(ranks: RankServer) -> None:
    """The reference is this process, in which nothing changes torch."""
    (ours,), theirs = ranks.run(stepped, world_size=1, names=OPTIMIZERS), stepped(OPTIMIZERS)
    for name in OPTIMIZERS:
        for one, other in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(one, other), name
