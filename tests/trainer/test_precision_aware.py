"""The precision-aware optimizer: what the trainer asks of Transformer Engine's Adam, and that its state comes back.

Transformer Engine needs a GPU. Here a class with its interface stands in for it (`FusedAdam` of 2.x: constructor,
`initialize_state`, `decoupled_grad`, steps counted per group), computed by torch in fp32; tests/gpu has the real one.
"""

from __future__ import annotations

import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, recipe, train, write_run

HALF: dict[str, Any] = {"torch_dtype": "bfloat16"}
CLIPPED: dict[str, Any] = {"clip_grad": 0.1, "adam_eps": 0.01, "weight_decay": 0.1}
"""Adam hardly sees the size of gradients, unless its epsilon is large."""
REDUCED: dict[str, Any] = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "main_grads_dtype": "bf16"}


class FusedAdam(torch.optim.Optimizer):
    """AdamW on fp32 main parameters beside bfloat16 ones, whose moments are stored in the given types."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode and master_weights and use_decoupled_grad and not store_param_remainders
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        assert not store_param_remainders
        self.state[param] = {name: torch.zeros_like(param, dtype=dtype) for name, dtype in self.dtypes.items()}
        self.state[param]["master_param"] = param.detach().clone().float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, False)
                self._update(param, group)

    def _update(self, param: Any, group: dict[str, Any]) -> None:
        state, grad, (b1, b2), step = self.state[param], param.decoupled_grad.float(), group["betas"], group["step"]
        first = state["exp_avg"].float().lerp_(grad, 1 - b1)
        second = state["exp_avg_sq"].float().mul_(b2).addcmul_(grad, grad, value=1 - b2)
        main = state["master_param"].mul_(1 - group["lr"] * group["weight_decay"])
        size = second.sqrt().div_((1 - b2**step) ** 0.5).add_(group["eps"])
        main.addcdiv_(first, size, value=-group["lr"] / (1 - b1**step))
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        param.copy_(main)


def train_with_it(run_dir: str) -> int:
    """Trains one rank as if Transformer Engine were there."""
    import megatron.core.optimizer as optimizers
    import megatron.core.utils as versions
    from megatron.core.optimizer import distrib_optimizer
    from packaging.version import Version

    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    versions._te_version = Version("2.8")
    optimizers.USING_PYTORCH_OPTIMIZER = False
    optimizers.Adam = distrib_optimizer.Adam = FusedAdam
    return train(run_dir)


def run_of(folder: Path, name: str, **groups: Any) -> Path:
    groups = {
        "model": HALF,
        "optimizer": CLIPPED,
        "resources": {"tasks_per_node": 2},
        "checkpoint": {"save_interval": 2},
        **groups,
    }
    run = folder / name
    made = recipe(folder, "qwen3", **groups)
    return write_run(made, run)


def aware(folder: Path, name: str, **fields: Any) -> Path:
    """A run with it, past the rule that it needs a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megabatch.config.run.check", lambda *args, **keywords: [])
        return run_of(folder, name, optimizer={**CLIPPED, "use_precision_aware_optimizer": True, **fields})


def test_state_in_fp32_trains_as_without_and_reduced_state_resumes_bit_for_bit(
    ranks: RankServer, tmp_path: Path
) -> None:
    plain = run_of(tmp_path, "plain")
    ranks.run(train, world_size=2, run_dir=str(plain))
    assert all(norm > 1.0 for _, _, norm in curve(plain)), "otherwise nothing was clipped"
    same = aware(tmp_path, "same")
    ranks.run(train_with_it, world_size=2, run_dir=str(same))
    for (_, loss, norm), (_, its_loss, its_norm) in zip(curve(same), curve(plain), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=1e-3), pytest.approx(its_norm, rel=1e-2))
    reduced = aware(tmp_path, "reduced", **REDUCED)
    ranks.run(train_with_it, world_size=2, run_dir=str(reduced))
    whole = curve(reduced)
    for (_, loss, _), (_, its_loss, _) in zip(whole, curve(plain), strict=True):
        assert loss == pytest.approx(its_loss, rel=1e-2)
    assert whole != curve(same), "otherwise nothing was reduced"
    shutil.rmtree(reduced / "checkpoints" / "step_00000004")
    (reduced / "metrics.jsonl").unlink()
    ranks.run(train_with_it, world_size=2, run_dir=str(reduced))
    assert [step for step, *_ in curve(reduced)] == [3, 4]
    assert curve(reduced) == whole[2:]
