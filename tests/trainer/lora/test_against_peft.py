"""The same adapters in peft on transformers: loss, gradients and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import COMMON, beside, gradients, make_base, opened
from rank_server import RankServer
from runs import recipe, write_run
from safetensors.torch import load_file

from megabatch.trainer.readouts.readout import Field, Readout

LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "biased, rank-stabilised": ("biased", {"use_rslora": True}),
    "by names of both": ("dense", {"target_modules": ["q_proj", "v_proj", "linear_fc2"]}),
    "by a pattern": ("dense", {"target_regex": r".*layers\.1\..*(linear_proj|up_proj)"}),
    "embedding and output": ("dense", {"target_modules": ["all-linear", "all-embedding", "output_layer"]}),
    "tied embedding": ("biased", {"target_modules": ["all-linear", "all-embedding"]}),
    "experts": ("experts", {}),
    "experts and router": ("experts", {"target_modules": ["all-linear", "all-router"]}),
    "whole modules and biases": ("biased", {"lora_bias": "all", "modules_to_save": ["final_layernorm"]}),
    "whole output layer": ("dense", {"modules_to_save": ["lm_head", "word_embeddings"]}),
    "everything of experts, rank-stabilised": (
        "experts",
        {"use_rslora": True, "target_modules": ["all-linear", "all-router", "all-embedding", "lm_head"]},
    ),
    "fused": ("dense", {"lora_fused": True, "target_modules": ["q_proj", "v_proj", "o_proj", "linear_fc1"]}),
    "fused of experts": ("experts", {"lora_fused": True}),
    "dense layers among experts": ("mixed", {"target_modules": ["all-linear", "all-router"]}),
}


@dataclass(frozen=True)
class Logits(Readout):
    """`logits` [T, V] as the model puts them out."""

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"logits": Field("token", (self.width,))}

    def __call__(self, output: torch.Tensor, pack: Any, split: Any) -> Mapping[str, torch.Tensor]:
        return {"logits": output[:, : self.width].float()}


def stepped(run_dir: str, folder: str) -> tuple[float, float, float, dict[str, Any], list[Any]]:
    """Saves the adapter, then takes a step; the parameters' norm before it, loss, gradient norm, gradients, and the
    step's rows with their logits."""
    with opened(run_dir) as (_, loop, progress):
        Path(folder).mkdir()
        loop.parts.export.save(loop.engine.model, loop.engine.ranks, Path(folder))
        step = next(loop.parts.steps.after(progress.cursor, loop.engine))
        size = loop.checkpoints.parameters_norm(loop.engine)
        logits = loop.engine.infer(step.packs, Logits(COMMON["vocab_size"]))
        result = loop.engine.step(step.packs, loop.parts.objective, totals=step.totals, filled=step.filled)
        found = {name: grad.numpy() for name, grad in gradients(loop.engine).items()}
        rows = [
            (p.ids_T, p.targets_T, p.weights_T, p.cu_seqlens_padded[: p.sequences + 1], one["logits"])
            for p, one in zip(step.packs, logits, strict=True)
        ]
        return size, result.metrics["loss"].value, result.grad_norm, found, [[x.numpy() for x in row] for row in rows]


def reference(base: Path, adapter: Path, rows: list[Any]) -> tuple[float, float, Any]:
    """The loss in peft, the largest difference of a logit relative to the largest, the model with its gradients."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    total, weight, far, largest = torch.zeros(()), 0.0, 0.0, 0.0
    for ids, targets, weights, starts, found in rows:
        for start, stop in pairwise(starts):
            logits = adapted(torch.from_numpy(ids[start:stop])[None]).logits[0]
            far = max(far, float((logits.detach() - torch.from_numpy(found[start:stop])).abs().max()))
            largest = max(largest, float(logits.detach().abs().max()))
            logps = logits.log_softmax(-1).gather(1, torch.from_numpy(targets[start:stop, None]))[:, 0]
            total = total - (logps * torch.from_numpy(weights[start:stop])).sum()
            weight += float(weights[start:stop].sum())
    (total / weight).backward()
    return float(total.detach() / weight), far / largest, adapted


@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_gradients_are_those_of_peft(case: str, ranks: RankServer, tmp_path: Path) -> None:
    model, tuner = CASES[case]
    base = make_base(tmp_path, model)
    made = recipe(
        tmp_path, "qwen3", tuner={**LORA, **tuner}, bridge={"merge_lora": False}, optimizer={"clip_grad": 0.0}
    )
    run = write_run(beside(made, base), tmp_path / "run")
    adapter = tmp_path / "adapter"
    ((size, loss, norm, found, rows),) = ranks.run(stepped, world_size=1, run_dir=str(run), folder=str(adapter))
    expected, far, adapted = reference(base, adapter, rows)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert far <= 1e-5
    theirs = _by_saved_name(adapted, found)
    assert theirs.keys() == found.keys()
    copies = _of_fused(theirs) if "fused" in case else set()
    for name, gradient in theirs.items():
        own = torch.from_numpy(found[name])
        assert float((own - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1e-3 * norm), name
    whole = [p.grad for n, p in adapted.named_parameters() if p.grad is not None and ".lora_" not in n]
    assert bool(whole) == ("whole" in case)
    once = [gradient for name, gradient in theirs.items() if name not in copies]
    total = torch.stack([gradient.norm() for gradient in [*once, *whole]]).norm()
    assert norm == pytest.approx(float(total), rel=1e-5)
    # peft keeps what modules_to_save trains beside what was there before
    parameters = [p for n, p in adapted.named_parameters() if ".original_module." not in n]
    squares = sum(float(p.detach().double().square().sum()) for p in parameters)
    saved = load_file(adapter / "adapter_model.safetensors")
    squares -= sum(float(saved[name].double().square().sum()) for name in copies)
    assert size == pytest.approx(squares**0.5, rel=1e-6)


def _by_saved_name(adapted: Any, names: Any) -> dict[str, torch.Tensor]:
    """Gradients by the names that a folder has; those of experts, which peft joins, taken apart."""
    grads = {n.replace(".default", ""): p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    found = {name: grads[name] if name in grads else _of_expert(grads, name) for name in names}
    return {name: grad.t() if name.endswith("lora_embedding_A") else grad for name, grad in found.items()}


def _of_fused(grads: dict[str, torch.Tensor]) -> set[str]:
    """Gives every part of a fused layer the gradient of the one A, the copies' sum. Returns: the other copies."""
    copies: set[str] = set()
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name in [name for name in grads if f"{parts[0]}.lora_A" in name]:
            names = [other for part in parts if (other := name.replace(parts[0], part)) in grads]
            grads |= dict.fromkeys(names, torch.stack([grads[one] for one in names]).sum(0))
            copies |= set(names[1:])
    return copies


def _of_expert(grads: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """peft wraps a layer's experts twice, `down_proj` outside: A of gate and up one below the other for each expert,
    B block by block with the experts' columns apart."""
    if ".experts." not in name:  # a weight that is adapted as a parameter
        return grads[name.replace(".lora_", ".base_layer.lora_") if name not in grads else name]
    layer, _, rest = name.partition(".experts.")
    number, leaf, side = int(rest.split(".")[0]), rest.split(".")[1], rest.split(".")[2]
    inner = "" if leaf == "down_proj" else ".base_layer"
    a, b = (grads[f"{layer}.experts{inner}.lora_{x}.weight"] for x in "AB")
    experts, rank = 4, 4
    if leaf == "down_proj":
        return a.view(experts, rank, -1)[number] if side == "lora_A" else b.view(-1, rank, experts)[..., number]
    half = ("gate_proj", "up_proj").index(leaf)
    if side == "lora_A":
        return a.view(experts, 2, rank, -1)[number, half]
    return b.view(2, b.shape[0] // 2, 2, rank, experts)[half, :, half, :, number]
