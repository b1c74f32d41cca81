"""Flex dispatch through all of megatron-core's code, DeepEP's calls exchanged over gloo: losses are those of alltoall,
padding goes nowhere, and a dispatch that is wrong ends the run before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deep_ep_on_gloo
import pytest
import torch
from rank_server import RankServer
from runs import curve, recipe, train, write_run

from megabatch.errors import ConfigError
from megabatch.run_directory import ExitCode
from megabatch.trainer.model.transformer_config import require_deep_ep

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"expert_model_parallel_size": 2},
    "tp2-etp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
    "tp2-ep2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 1,
        "expert_model_parallel_size": 2,
    },
    "ep2-recomputed": {"expert_model_parallel_size": 2},
    "pp2-ep2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
}
RECOMPUTED = ("core_attn", "moe")


def run_of(folder: Path, name: str, layout: str, dispatcher: str) -> Path:
    """Rows padded to one length; past the rules that DeepEP needs GPUs and bfloat16."""
    size = 4 if layout.startswith("pp2") else 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megabatch.config.run.check", lambda *args, **keywords: [])
        made = recipe(
            folder,
            "qwen3_moe",
            model={"num_layers": 2},
            parallel=LAYOUTS[layout],
            resources={"tasks_per_node": size},
            data={"pad_to_max_length": True},
            moe={"moe_token_dispatcher_type": dispatcher, "moe_aux_loss_coeff": 0.01, "moe_deepep_num_sms": 24},
            evaluation={"eval_iters": 0},
            recompute={"recompute_modules": RECOMPUTED if layout.endswith("recomputed") else ("core_attn",)},
        )
        return write_run(made, folder / name)


def train_flex(run_dir: str) -> tuple[int, int, tuple[int, int]]:
    deep_ep_on_gloo.install()
    code = train(run_dir)
    return code, deep_ep_on_gloo.Buffer.num_sms, deep_ep_on_gloo.Buffer.calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_alltoall(layout: str, ranks: RankServer, tmp_path: Path) -> None:
    size = 4 if layout.startswith("pp2") else 2
    plain = run_of(tmp_path, "alltoall", layout, "alltoall")
    assert ranks.run(train, world_size=size, run_dir=str(plain)) == [ExitCode.DONE] * size
    flex = run_of(tmp_path, "flex", layout, "flex")
    for code, sms, (sent, none) in ranks.run(train_flex, world_size=size, run_dir=str(flex)):
        assert (code, sms) == (ExitCode.DONE, 24)
        assert sent > 0 and none > 0, "otherwise there was no padding"
    for (step, loss, norm), (_, its_loss, its_norm) in zip(curve(flex), curve(plain), strict=True):
        assert (loss, norm) == (pytest.approx(its_loss, rel=2e-6), pytest.approx(its_norm, rel=1e-5)), f"step {step}"


def train_wrongly(run_dir: str, fault: str) -> int:
    """With a DeepEP that gives experts the wrong tokens, or ours without the part that leaves padding out."""
    deep_ep_on_gloo.install()
    if fault == "padding":
        from megabatch.trainer import megatron_moe

        megatron_moe._setup_metadata = megatron_moe._setup_all
    else:
        combine = deep_ep_on_gloo.Buffer.combine

        def other(self: Any, x: torch.Tensor, handle: Any, topk_weights: Any = None, **more: Any) -> Any:
            x = x.roll(1, 0) if (topk_weights is None) == (fault == "forward") else x
            return combine(self, x, handle, topk_weights, **more)

        deep_ep_on_gloo.Buffer.combine = other  # type: ignore[method-assign]
    return train(run_dir)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("forward", r"does not give a layer of experts the results of alltoall.*outputs differ by (0\.[1-9]|[1-9])"),
        ("backward", r"outputs differ by (0|\d+(\.\d+)?e-0[6-9]) and gradients by (0\.[1-9]|[1-9])"),
        ("padding", r"outputs differ by (0|\d+(\.\d+)?e-0[6-9]) .* experts got \[\d+, \d+\] tokens, with alltoall"),
    ],
)
def test_a_wrong_dispatch_ends_the_run_before_its_first_step(
    fault: str, words: str, ranks: RankServer, tmp_path: Path
) -> None:
    run = run_of(tmp_path, "flex", "ep2", "flex")
    with pytest.raises(RuntimeError, match=words):
        ranks.run(train_wrongly, world_size=2, run_dir=str(run), fault=fault)
    assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text()


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ConfigError, match="flex needs the package deep_ep, which is not installed on this node"):
        require_deep_ep()
