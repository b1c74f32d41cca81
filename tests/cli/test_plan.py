"""`megabatch plan`: estimates of a recipe, and its layouts ranked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megabatch.cli.command import main

ROOT = Path(__file__).parents[2]
MOE, LONG, SMALL = (ROOT / "recipes" / f"{name}.py" for name in ("qwen3_moe_sft", "long_context_sft", "quickstart"))


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _plan(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    assert main(["plan", *map(str, arguments)]) == code
    shown = capsys.readouterr()
    return shown.out if code == 0 else shown.err


def _json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    return json.loads(_plan(capsys, *arguments, "--json"))


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    shown = _plan(capsys, SMALL, "--run_dir", tmp_path / "file" / "x")
    assert f"run directory='{tmp_path}/file/x' cannot be written: {tmp_path}/file is a file" in shown
    for flag, field in (("--run_dir", "--run_dir"), ("--save", "checkpoint.save")):
        shown = _plan(capsys, SMALL, flag, "a\nb", code=2)
        assert f"{field}='{tmp_path}/a\\nb' holds a control character, such as a line end" in shown


def test_memory_is_shown_by_stage_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _plan(capsys, MOE, "--gpu", "a800")
    assert "estimate on A800 (79.2 GiB)" in shown
    header, *stages = [line.split() for line in shown.splitlines() if line.startswith(("stage", "0 ", "1 "))]
    assert header[1:4] == ["weights", "gradients", "optimizer"]
    first, second = [dict(zip(header, stage, strict=False)) for stage in stages]
    assert float(first["optimizer"]) == pytest.approx(3 * float(first["gradients"]), abs=0.2)
    assert first["logits"] == "0.0" and float(second["logits"]) > 1
    assert "MFU" in shown and "note" in shown


def test_programs_get_bytes_and_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, MOE, "--gpu", "h100")
    memory = dict(found["memory"])
    assert memory.pop("total") == sum(memory.values())
    step = found["step"]
    parts = step["compute_s"] + step["bubble_s"] + step["optimizer_s"] + sum(step["communication_s"].values())
    assert step["total_s"] == pytest.approx(parts)
    assert found["parameters"] == 30_532_122_624 and found["gpu"]["name"] == "H100"


def test_flags_of_the_recipe_count(capsys: pytest.CaptureFixture[str]) -> None:
    plain = _json(capsys, MOE)
    kept = _json(capsys, MOE, "--recompute_granularity", "none", "--recompute_method", "none",
                 "--recompute_num_layers", "none")  # fmt: skip
    assert kept["memory"]["activations"] > 10 * plain["memory"]["activations"]
    assert kept["step"]["total_s"] < plain["step"]["total_s"]


def test_layouts_are_ranked_and_those_left_out_counted(capsys: pytest.CaptureFixture[str]) -> None:
    layouts = _json(capsys, MOE, "--gpus", 16, "--gpu_memory_gib", 60, "--gpu", "a800")
    kept = [one for one in layouts if one["keep"]]
    times = [one["estimate"]["step"]["total_s"] for one in kept]
    assert times == sorted(times) and layouts[: len(kept)] == kept
    assert all(one["estimate"]["memory"]["total"] <= 60 * 2**30 for one in kept)
    assert all(one["tp"] <= 8 and one["ep"] * one["etp"] <= 8 for one in kept)  # a node
    reasons = " ".join(one["reason"] for one in layouts[len(kept) :])
    assert "> 60 GiB" in reasons and "ep crosses nodes of 8 GPUs" in reasons
    default = _plan(capsys, MOE, "--gpus", 16, "--gpu", "a800")
    assert "in 71.3 GiB of 79.2 each" in default, "a tenth stays free unless somebody says otherwise"
    shown = _plan(capsys, MOE, "--gpus", 16, "--gpu_memory_gib", 60, "--gpu", "a800")
    assert shown.startswith(f"{len(kept)} of {len(layouts)} layouts can run on 16 x A800 in 60 GiB of 79.2 each")
    counts = [int(line.split()[0]) for line in shown.splitlines() if "pruned:" in line]
    assert sum(counts) == len(layouts) - len(kept)
    everything = _plan(capsys, MOE, "--gpus", 16, "--gpu_memory_gib", 60, "--gpu", "a800", "--all")
    assert len(everything.splitlines()) == len(layouts) + 3


@pytest.mark.parametrize("shown", [[], ["--json"], ["--all"]])
def test_no_layout_at_all_is_no_success(shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(MOE), "--gpus", "8", "--gpu", "a800", "--gpu_memory_gib", "2", *shown]) == 1
    said = capsys.readouterr()
    assert "no layout can run on 8 GPUs" in said.err and "> 2 GiB" in said.out


def test_long_rows_are_cut_over_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """At 128K the fastest layouts of those that fit have context parallelism."""
    layouts = _json(capsys, LONG, "--gpus", 8, "--gpu", "h100")
    kept = [one["cp"] for one in layouts if one["keep"]]
    assert len(kept) > 10 and all(cp > 1 for cp in kept[:3]) and 1 in kept


def test_the_recipes_own_layout_is_among_them_with_its_own_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    own = _json(capsys, MOE, "--gpu", "a800")
    sizes = {"tp": 4, "pp": 2, "vp": 1, "cp": 1, "ep": 4, "etp": 1, "micro_batch_size": 1}
    (same,) = [
        one
        for one in _json(capsys, MOE, "--gpus", 8, "--gpu", "a800")
        if all(one[name] == size for name, size in sizes.items())
    ]
    assert same["keep"] and same["estimate"]["memory"] == own["memory"] and same["estimate"]["step"] == own["step"]


def test_a_recipe_for_cpus_has_no_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert "asks for no GPUs" in _plan(capsys, SMALL)
    assert "estimate on H200" in _plan(capsys, SMALL, "--gpu", "h200")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gpu", "v100"], "gpu='v100' is not known; there are A100"),
        (["--gpus", "12"], "--gpus=12 must fill whole nodes of gpus_per_node=8, or be less than one node; try 8"),
        (["--expert_model_parallel_size", "6"], "must divide the model's num_experts=128"),
        (["--gpus_per_nod", "8"], "gpus_per_node"),
    ],
)
def test_mistakes_are_faults(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert text in _plan(capsys, MOE, *arguments, code=2)


@pytest.mark.parametrize("flag", [["--gpus", "16"], ["--all"], ["--json"], ["--gpu_memory_gib", "60"]])
def test_a_chain_and_a_sweep_take_no_options_of_a_single_recipes_plan(
    capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    for file in (ROOT / "recipes/arithmetic_grpo.py", ROOT / "recipes/sweeps/qwen3_moe_layouts.py"):
        assert f"{flag[0]} is for the plan of a single recipe" in _plan(capsys, file, *flag, code=2)


def test_a_sweep_is_estimated_for_the_named_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(ROOT / "recipes/sweeps/qwen3_moe_layouts.py"), "--gpu", "h200"])
    assert "estimated for H200 GPUs" in "".join(capsys.readouterr())


def test_a_profile_that_names_its_gpu_brings_the_estimate_along(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    profile = tmp_path / "alps.toml"
    profile.write_text('gpu = "A800"\n')
    shown = _plan(capsys, MOE, "--cluster", profile)
    assert "estimate     A800: a rank takes 69.3 GiB of 79.2; " in shown and "estimate on A800 (79.2 GiB)" in shown
    profile.write_text('gpu = "A1000"\n')
    assert "gpu='A1000' is not known" in _plan(capsys, MOE, "--cluster", profile, code=2)


def test_help_is_the_commands_and_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _plan(capsys, MOE, "--help")
    assert shown.startswith("megabatch plan RECIPE.py") and "--gpu_memory_gib" in shown
    assert "tensor_model_parallel_size" in shown


def test_help_needs_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert capsys.readouterr().out.startswith("megabatch plan RECIPE.py")
    assert main(["plan", "--gpus", "8"]) == 2
    assert capsys.readouterr().err == "error: megabatch plan needs a recipe: megabatch plan RECIPE.py; see --help\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--submit"], "--submit has no effect on a plan"),
        (["--gpus", "0"], "--gpus=0 must be at least 1"),
        (["--gpus", "2", "--gpu_memory_gib", "-3"], "--gpu_memory_gib=-3.0 must be above 0"),
    ],
)
def test_what_a_plan_cannot_be_asked(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in _plan(capsys, SMALL, *flags, code=2)
    assert not Path("megatron_output").exists()


def test_a_fault_that_no_layout_mends_is_told_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "endless.py"
    text = "from megabatch import Model, Data, Recipe\n\ndef recipe():\n    return Recipe(name='e', task='sft', "
    recipe.write_text(text + "model=Model(model='Qwen/Qwen3-8B'), data=Data(dataset=['x.jsonl']))\n")
    assert main(["plan", str(recipe), "--gpus", "8"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: 1 fault") and "train_iters is missing" in said.err and not said.out
