"""Runs with adapters stop, go on, start from others' adapters, and give theirs away."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import beside, make_base
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, write_run
from safetensors.torch import load_file

from megabatch import Recipe
from megabatch.converters import ConversionRequest, convert
from megabatch.converters.families import family_of
from megabatch.converters.hf_model import read_config
from megabatch.entry.tuning import tuning_faults
from megabatch.run_directory import ExitCode
from megabatch.saved.manifest import read_manifest

LORA: dict[str, Any] = {
    "tuner_type": "lora",
    "lora_rank": 4,
    "lora_alpha": 16,
    "target_modules": ["all-linear", "all-router", "all-embedding", "output_layer"],
}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "dp2": (2, {}),
    "dp2_plain": (2, {"use_distributed_optimizer": False}),
    "tp2_sp_ep2": (2, {**TP2_SP, "expert_model_parallel_size": 2}),
    "tp2_etp2": (2, {**TP2_SP, "expert_tensor_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}
FIRST, LAST = (Path("checkpoints") / f"step_{step:08d}" for step in (1, 6))
UNSEEN = {"eval_iters": 0}
"""No evaluation, in runs that ask about training alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_base(folder, "experts")
    return folder


def made(folder: Path, layout: str, **groups: Any) -> tuple[Recipe, int]:
    world_size, parallel = LAYOUTS[layout]
    values: dict[str, Any] = {
        "tuner": {**LORA, **groups.pop("tuner", {})},
        "training": groups.pop("training", {"train_iters": 6}),
        "parallel": parallel,
        "bridge": {"merge_lora": False, **groups.pop("bridge", {})},
        "resources": {"tasks_per_node": world_size},
    }
    dtype = groups.pop("model", {}).get("torch_dtype", "float32")
    return beside(recipe(folder, "qwen3", **values, **groups), folder / "experts", dtype), world_size


def trained(
    ranks: RankServer, folder: Path, name: str, layout: str, *, stop_after: int | None = None, **groups: Any
) -> Path:
    one, world_size = made(folder, layout, **groups)
    run = write_run(one, folder / name) if not (folder / name).exists() else folder / name
    status = ranks.run(train, world_size=world_size, run_dir=str(run), stop_after=stop_after)
    assert set(status) == {ExitCode.DONE if stop_after is None else ExitCode.REQUEUE}
    return run


def test_bfloat16_resumes_bit_for_bit_and_checkpoints_beside_training_are_the_same(
    ranks: RankServer, folder: Path
) -> None:
    """The adapter's main copies are fp32; what is written beside training is what waiting for it writes."""
    bf16: dict[str, Any] = {"model": {"torch_dtype": "bfloat16"}, "evaluation": UNSEEN}
    whole = trained(ranks, folder, "bf16", "tp2_etp2", **bf16)
    cut = trained(ranks, folder, "bf16-cut", "tp2_etp2", stop_after=3, **bf16)
    trained(ranks, folder, "bf16-cut", "tp2_etp2", **bf16)
    beside = trained(ranks, folder, "bf16-beside", "tp2_etp2", checkpoint={"async_save": True}, **bf16)
    assert curve(cut) == curve(whole) == curve(beside)
    first, *others = (load_file(run / LAST / "hf" / "adapter_model.safetensors") for run in (whole, cut, beside))
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert all(torch.equal(other[name], tensor) for other in others for name, tensor in first.items())


@pytest.mark.parametrize("layout", ["dp2", "dp2_plain", "tp2_sp_ep2"])
def test_stop_and_resume_give_the_uninterrupted_curve_bit_for_bit(
    layout: str, ranks: RankServer, folder: Path
) -> None:
    """Dropout included, whose generators are saved."""
    whole = trained(ranks, folder, f"whole-{layout}", layout)
    cut = trained(ranks, folder, f"cut-{layout}", layout, stop_after=3)
    trained(ranks, folder, f"cut-{layout}", layout)
    assert curve(cut) == curve(whole) and evaluations(cut) == evaluations(whole)
    assert len(curve(cut)) == 6
    before, after = (load_file(run / LAST / "hf" / "adapter_model.safetensors") for run in (whole, cut))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_another_layout_goes_on_with_the_same_curve(ranks: RankServer, folder: Path) -> None:
    still: dict[str, Any] = {"tuner": {"lora_dropout": 0.0}, "evaluation": UNSEEN}
    whole = trained(ranks, folder, "whole", "alone", **still)
    cut = trained(ranks, folder, "cut", "tp2_etp2", stop_after=3, **still)
    for layout in ("dp2", "pp2", "tp2_sp_ep2"):
        tuner = {"lora_dropout": 0.0, "adapter_load": str(cut)}
        moved = trained(ranks, folder, f"moved-{layout}", layout, tuner=tuner, evaluation=UNSEEN)
        for (step, loss, norm), expected in zip(curve(moved), curve(whole)[3:], strict=True):
            assert (step, loss) == (expected[0], pytest.approx(expected[1], rel=1e-5))
            assert norm == pytest.approx(expected[2], rel=1e-4)


def test_a_checkpoint_holds_what_is_trained_alone(ranks: RankServer, folder: Path) -> None:
    run = trained(ranks, folder, "whole-dp2", "dp2")
    from megabatch.converters.torch_dist.folder import TorchDistFolder

    keys = set(TorchDistFolder(run / LAST / "mcore").entries)
    assert all(".lora_" in key or key.startswith("rng_state") for key in keys)
    kinds = {re.split(r"\.(?:decoder|embedding|output_layer)\.", k)[0] for k in keys if k.startswith("optimizer.")}
    assert kinds == {"optimizer.state.param", "optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"}


@pytest.mark.parametrize("layout", ["dp2", "tp2_etp2"])
def test_the_converters_read_a_checkpoint(layout: str, ranks: RankServer, folder: Path, tmp_path: Path) -> None:
    run = trained(ranks, folder, f"whole-{layout}", layout)
    convert(
        ConversionRequest(to_hf=True, adapters=[run / LAST / "mcore"], model=folder / "experts", merge_lora=False),
        output_dir=tmp_path / "adapter",
    )
    found, expected = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "adapter", run / LAST / "hf"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["alone", "tp2_sp_ep2", "tp2_etp2", "pp2"])
def test_the_merged_model_is_the_adapted_one(layout: str, ranks: RankServer, folder: Path, tmp_path: Path) -> None:
    run = trained(ranks, folder, f"whole-{layout}", layout)
    again = {"adapters": [str(run / LAST / "hf")], "merge_lora": True}
    still: dict[str, Any] = {"learning_rate": {"lr": 1e-30, "min_lr": 0.0}, "training": {"train_iters": 1}}
    one, world_size = made(folder, layout, bridge=again, evaluation=UNSEEN, **still)
    merged = write_run(one, tmp_path / "merged")
    ranks.run(train, world_size=world_size, run_dir=str(merged))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "experts", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, run / LAST / "hf").eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged / FIRST / "hf", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 17, 200, 3, 99, 4, 4, 250]])
    with torch.no_grad():
        found, expected = plain(ids).logits, adapted(ids).logits
        with adapted.disable_adapter():
            assert (adapted(ids).logits - expected).abs().max() > 1e-2, "the adapter changes something"
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_adapters_of_both_formats_go_on_as_they_were(ranks: RankServer, folder: Path, tmp_path: Path) -> None:
    run = trained(ranks, folder, "whole-dp2", "dp2")
    last = evaluations(run)[-1][1]
    convert(
        ConversionRequest(to_mcore=True, adapters=[run / LAST / "hf"], model=folder / "experts", merge_lora=False),
        output_dir=tmp_path / "mcore",
    )
    starts: dict[str, dict[str, Any]] = {
        "peft": {"bridge": {"adapters": [str(run / LAST / "hf")]}},
        "mcore": {"tuner": {"adapter_load": str(tmp_path / "mcore")}},
        "ours": {"tuner": {"adapter_load": str(run)}, "checkpoint": {"finetune": True}},
    }
    for name, groups in starts.items():
        began = trained(ranks, folder, f"began-{name}", "tp2_sp_ep2", training={"train_iters": 2}, **groups)
        assert [step for step, *_ in curve(began)] == [1, 2]
        assert evaluations(began)[0][1] == pytest.approx(last, rel=1e-6), name
    for part, name in (("hf", "adapter_model.safetensors"), ("hf", "adapter_config.json"), ("mcore", "__0_0.distcp")):
        step = shutil.copytree(run / LAST, tmp_path / part / name / Path(LAST).name)
        damage(step / part / name)
        one, world_size = made(folder, "alone", bridge={"adapters": [str(step / part)]})
        with pytest.raises(RuntimeError, match=rf"is damaged\n *{part}/{name}: .* differs from its digest"):
            ranks.run(train, world_size=world_size, run_dir=str(write_run(one, tmp_path / f"{part}-{name}")))


def damage(file: Path) -> None:
    """Of a number, or in what the config says of the base model."""
    data = file.read_bytes()
    if file.suffix == ".json":
        file.write_bytes(data.replace(b"experts", b"exparts"))
        return
    manifest = read_manifest(file.parents[1])
    assert manifest is not None
    parts = manifest.files[file.relative_to(manifest.folder).as_posix()].ranges
    at = next(part.offset + part.size // 2 for part in parts if "lora_B" in part.name and "optim" not in part.name)
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_an_adapter_of_another_rank_is_refused(ranks: RankServer, folder: Path, tmp_path: Path) -> None:
    run = trained(ranks, folder, "whole-dp2", "dp2")
    for fields, message in (
        ({"lora_rank": 8, "lora_alpha": 32}, "has rank 4 in .*, and lora_rank is 8; try 4"),
        ({"lora_alpha": 8}, "is scaled by 4 in .*, and the run's by 2"),
        (
            {"target_modules": ["all-linear"]},
            "adapts lm_head.weight, model.embed_tokens.weight and 2 more, which the run does not",
        ),
    ):
        one, _ = made(folder, "alone", tuner=fields, bridge={"adapters": [str(run / LAST / "hf")]})
        name = json.dumps(fields).replace(" ", "")[:24].replace('"', "").replace("/", "")
        other = write_run(replace(one), tmp_path / name)
        with pytest.raises(RuntimeError, match=message):
            ranks.run(train, world_size=1, run_dir=str(other))
        config = read_config(folder / "experts")
        before, _ = made(folder, "alone", tuner={**fields, "adapter_load": str(run)})
        (fault,) = tuning_faults(before, family_of(config).shape(config))
        assert fault.field == "tuner.adapter_load:" and re.search(message, str(fault)), "before the queue too"


def test_the_fused_form_is_the_same_at_a_layout_and_saved_for_both_formats(
    ranks: RankServer, folder: Path, tmp_path: Path
) -> None:
    """Query and value of a layer share an A, of which PEFT's folder has two copies and ours one."""
    fused: dict[str, Any] = {
        "lora_fused": True,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj", "o_proj", "linear_fc1"],
    }
    alone = trained(ranks, folder, "fused", "alone", tuner=fused)
    both = trained(ranks, folder, "fused-tp2", "tp2_sp_ep2", tuner=fused)
    for (step, loss, norm), expected in zip(curve(both), curve(alone), strict=True):
        assert (step, loss, norm) == (expected[0], *(pytest.approx(one, rel=1e-5) for one in expected[1:]))
    saved = load_file(alone / LAST / "hf" / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(saved[first], saved[first.replace("q_proj", "v_proj")])
    convert(
        ConversionRequest(to_hf=True, adapters=[both / LAST / "mcore"], model=folder / "experts", merge_lora=False),
        output_dir=tmp_path / "adapter",
    )
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = load_file(both / LAST / "hf" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() == saved.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    own = {**fused, "lora_fused": False}
    for tuner in (fused, own):
        start = {"bridge": {"adapters": [str(alone / LAST / "hf")]}, "training": {"train_iters": 1}}
        name = f"again-{tuner['lora_fused']}"
        began = trained(ranks, folder, name, "dp2", tuner=tuner, **start)
        assert evaluations(began)[0][1] == pytest.approx(evaluations(alone)[-1][1], rel=1e-6)
    apart = trained(ranks, folder, "again-False", "dp2") / "checkpoints" / "step_00000001" / "hf"
    one, _ = made(folder, "alone", tuner=fused, bridge={"adapters": [str(apart)]})
    config = read_config(folder / "experts")
    (fault,) = tuning_faults(one, family_of(config).shape(config))
    assert "has an A of its own in model.layers.0.self_attn.v_proj" in str(fault)
