"""GRPO's losses on fixed completions: those of transformers in fp64, and the same at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import completions
import numpy as np
import pytest
import torch
from completions import Completions, reference_loss
from rank_server import RankServer
from rolled import GROUP, LONGEST, TEMPERATURE, VARIANTS, inferred, measured, near, rolled, settings
from runs import recipe, write_run

from megabatch.config.run import RunConfig

LORA = {"tuner": {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VPP = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
FOUR, TWO = {"micro_batch_size": 4}, {"micro_batch_size": 2}
LAYOUTS: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
    "rows_of_4": ("qwen2", 1, {"batch": FOUR}),
    "dp2": ("qwen2", 2, {}),
    "cp2": ("qwen2", 2, {"parallel": {"context_parallel_size": 2}}),
    "shared": ("qwen2", 1, {"batch": FOUR}),
    "shared_by_2_dp2": ("qwen2", 2, {"batch": FOUR}),
    "shared_tp2_sp": ("qwen2", 2, {"parallel": TP, "batch": FOUR}),
    "shared_by_2_pp2_vpp2": ("qwen2", 2, {"parallel": VPP, "batch": TWO}),
    "shared_cp2": ("qwen2", 2, {"parallel": {"context_parallel_size": 2}, "batch": FOUR}),
    "shared_ep2": ("qwen3_moe", 2, {"parallel": {"expert_model_parallel_size": 2}, "batch": FOUR}),
    "shared_lora_tp2_sp": ("lora", 2, {**LORA, "parallel": TP, "batch": FOUR}),
}
"""Where it says so, 4 or 2 completions of a prompt lie in a row and share its tokens."""
ALONE = {"qwen2": ("qwen2", {}), "qwen3_moe": ("qwen3_moe", {}), "lora": ("qwen2", LORA)}
FEW = ["grpo", "dapo_corrected", "real", "dapo_teacher"]
"""Variants of the models that differ only below the loss."""


def _variants(model: str) -> list[str]:
    return list(VARIANTS) if model == "qwen2" else FEW


def _run(folder: Path, name: str, model: str, world_size: int, groups: dict[str, Any]) -> Path:
    base, own = ALONE[model]
    batch = {"micro_batch_size": 1, **groups.get("batch", {})}
    made = recipe(folder, base, **{**own, **groups, "batch": batch, "resources": {"tasks_per_node": world_size}})
    return write_run(made, folder / name)


@pytest.fixture(scope="module")
def alone(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds, with one completion a micro-batch."""
    folder = tmp_path_factory.mktemp("grpo")
    found: dict[str, Any] = {"folder": folder}
    for model in ALONE:
        run = _run(folder, model, model, 1, {})
        (found[model],) = ranks.run(measured, world_size=1, run_dir=str(run), variants=_variants(model))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_a_loss_or_gradient(layout: str, ranks: RankServer, alone: dict[str, Any]) -> None:
    model, world_size, groups = LAYOUTS[layout]
    expected, logps, _ = alone[model]
    # the mean over a micro-batch's own tokens depends on what is in it
    whole = "batch" not in groups and layout != "dp2"
    variants = [one for one in _variants(model) if whole or one != "bnpo"]
    together = (2 if "by_2" in layout else 4) if "shared" in layout else 1
    run = _run(alone["folder"], layout, model, world_size, groups)
    settings = {"run_dir": str(run), "variants": variants, "logps": logps, "together": together}
    for found, own, _ in ranks.run(measured, world_size=world_size, **settings):
        assert np.concatenate(own) == pytest.approx(np.concatenate(logps), abs=1e-5)
        for variant in variants:
            (loss, norm, metrics), (true_loss, true_norm, true_metrics) = found[variant], expected[variant]
            assert loss == pytest.approx(true_loss, rel=2e-5, abs=2e-6), variant
            assert norm == pytest.approx(true_norm, rel=2e-5), variant
            assert metrics.keys() == true_metrics.keys()
            for name, sums in metrics.items():
                assert sums == pytest.approx(true_metrics[name], rel=1e-4, abs=1e-4), (variant, name)


@pytest.mark.parametrize("layout", ["alone", "dp2", "shared_by_2_pp2_vpp2", "shared_ep2"])
def test_log_probabilities_of_larger_micro_batches(layout: str, ranks: RankServer, alone: dict[str, Any]) -> None:
    """One pass takes fewer micro-batches, and fewer tokens where they share prompts; the numbers stay."""
    model, world_size, groups = LAYOUTS.get(layout, ("qwen2", 1, {}))
    cases = {"each": (1, 1), "of 8": (8, 1), "of 8, shared": (8, 4), "of 6, shared by 2": (6, 2), "all": (64, 4)}
    run = _run(alone["folder"], f"{layout}, inferred", model, world_size, groups)
    found = ranks.run(inferred, world_size=world_size, run_dir=str(run), cases=cases)
    for of_rank in found:
        for case, (logps, _, _) in of_rank.items():
            assert np.concatenate(logps) == pytest.approx(np.concatenate(alone[model][1]), abs=1e-5), case
    ways = 2 if layout in ("dp2", "shared_ep2") else 1
    counts = {case: sum(of_rank[case][1] for of_rank in found) * ways // world_size for case in cases}
    tokens = {case: sum(of_rank[case][2] for of_rank in found) * ways // world_size for case in cases}
    assert (counts["each"], counts["of 8"], counts["of 8, shared"]) == (16, 2, 2)
    # an interleaved pipeline wants two micro-batches at least
    assert counts["all"] == (2 if layout == "shared_by_2_pp2_vpp2" else ways)
    assert tokens["each"] == tokens["of 8"] > tokens["of 6, shared by 2"] > tokens["of 8, shared"] == tokens["all"]


def test_a_fresh_adapter_changes_no_loss(alone: dict[str, Any]) -> None:
    for variant in FEW:
        assert alone["lora"][0][variant][0] == pytest.approx(alone["qwen2"][0][variant][0], rel=1e-6)


def _padded(found: list[Any], values: Any, fill: float = 0.0) -> torch.Tensor:
    out = torch.full((len(found), LONGEST), fill, dtype=torch.float64)
    for row, one in enumerate(found):
        out[row, : len(one.ids)] = torch.as_tensor(np.asarray(values(one)), dtype=torch.float64)
    return out


def _of_transformers(model: Any, some: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies [B, L] of the completions' tokens, a sequence at a time."""
    logps, entropies = [], []
    for one in some:
        ids = torch.from_numpy(np.concatenate([one.prompt, one.ids]).astype(np.int64))
        logits = model(ids[None]).logits[0, len(one.prompt) - 1 : -1] / TEMPERATURE
        all_logps = logits.log_softmax(-1)
        rest = (0, LONGEST - len(one.ids))
        own = all_logps.gather(1, ids[len(one.prompt) :, None])[:, 0]
        logps.append(torch.nn.functional.pad(own, rest))
        entropies.append(torch.nn.functional.pad(-(all_logps.exp() * all_logps).sum(-1), rest).detach())
    return torch.stack(logps), torch.stack(entropies)


def test_losses_and_gradients_are_those_of_transformers_in_fp64(
    alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole gradient of every loss, by Hugging Face's names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(completions, "LONGEST", LONGEST)
    found, logps, (weights, gradients) = alone["qwen2"]
    run = RunConfig.load(alone["folder"] / "qwen2" / "run.json")
    config = AutoConfig.from_pretrained(Path(run.run_dir) / "model")
    model = AutoModelForCausalLM.from_config(config).double()
    model.load_state_dict({name: torch.from_numpy(values).double() for name, values in weights.items()}, strict=False)
    model.tie_weights()
    for variant in VARIANTS:
        grpo = settings(variant)
        corrected, taught = variant.endswith("corrected"), variant.endswith("teacher")
        some = near(rolled(run.shape.vocab_size, corrected=corrected, taught=taught), logps)
        own, entropies = _of_transformers(model, some)
        mask = _padded(some, lambda one: np.ones(len(one.ids)))
        if grpo.overlong_filter:
            mask = mask * torch.tensor([[float(not one.is_cut_off)] for one in some])
        batch = Completions(
            logps=own,
            old=_padded(some, lambda one: one.tokens["old"]),
            reference=_padded(some, lambda one: one.tokens["reference"]),
            entropies=entropies,
            correction=_padded(some, lambda one: one.tokens.get("correction", np.ones(len(one.ids)))),
            teacher=_padded(some, lambda one: one.tokens.get("teacher", np.zeros(len(one.ids)))),
            mask=mask,
            advantages=torch.tensor([one.advantage for one in some], dtype=torch.float64),
        )
        model.zero_grad()
        if grpo.loss_type == "bnpo":  # each completion is a micro-batch of its own
            parts = [reference_loss(batch.part(slice(n, n + 1)), grpo) for n in range(len(some))]
            loss = sum(numerator / count for numerator, count in parts) / len(parts)
        else:
            numerator, count = reference_loss(batch, grpo, corrected=corrected, taught=taught)
            loss = numerator / count
        loss.backward()
        if grpo.loss_type != "bnpo":  # whose metric is the mean over the tokens of all micro-batches
            assert found[variant][0] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6), variant
        squared = 0.0
        for name, parameter in model.named_parameters():
            got = torch.from_numpy(gradients[variant][name]).double()
            squared += parameter.grad.square().sum().item()
            difference = (got - parameter.grad).norm() / parameter.grad.norm()
            assert difference < 2e-5, (variant, name, difference)
        assert found[variant][1] == pytest.approx(squared**0.5, rel=2e-5), variant


def test_completions_differ_enough_to_tell_losses_apart(alone: dict[str, Any]) -> None:
    losses = [round(found[0], 6) for found in alone["qwen2"][0].values()]
    assert len(set(losses)) == len(losses) and GROUP > 1
