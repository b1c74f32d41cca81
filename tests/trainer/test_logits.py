"""What reaches the loss of a bf16 run: bf16 logits, with the numbers that fp32 copies of them give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_server import RankServer
from runs import curve, recipe, train, write_run


def trained(run_dir: str, fp32: bool) -> list[str]:
    """Trains one rank; dtypes of the logits that its losses were given."""
    import torch
    from megatron.core.transformer.module import Float16Module

    from megabatch.trainer.model.build import HalfPrecision
    from megabatch.trainer.readouts import tokens

    real, seen = tokens.token_logps, []

    def noted(logits: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.append(str(logits.dtype))
        return real(logits, *arguments, **keywords)

    tokens.token_logps = noted
    if fp32:
        HalfPrecision.forward = Float16Module.forward  # type: ignore[method-assign]
    assert train(run_dir) == 0
    return seen


@pytest.mark.parametrize("pp", [1, 2])
def test_a_bfloat16_run_keeps_no_fp32_copy_of_its_logits(pp: int, ranks: RankServer, tmp_path: Path) -> None:
    curves = []
    for fp32 in (False, True):
        groups: dict[str, dict[str, Any]] = {
            "model": {"torch_dtype": "bfloat16"},
            "parallel": {"pipeline_model_parallel_size": pp},
            "resources": {"tasks_per_node": pp},
        }
        run = write_run(recipe(tmp_path, "qwen3", **groups), tmp_path / f"fp32-{fp32}")
        *_, last = ranks.run(trained, world_size=pp, run_dir=str(run), fp32=fp32)
        assert set(last) == {"torch.float32" if fp32 else "torch.bfloat16"}
        curves.append(curve(run))
    assert curves[0] == curves[1] and len(curves[0]) == 4
