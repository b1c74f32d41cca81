"""Adapters there and back again, byte for byte, and in PEFT's two layouts of experts, as peft itself loads them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_adapters import Made, Tensors, changed, load, logits, logits_of
from safetensors.torch import load_file, save_file

import megabatch
from megabatch.converters import ConversionRequest, convert
from megabatch.converters.command import main
from megabatch.converters.torch_dist.folder import TorchDistFolder
from megabatch.errors import ConversionError

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from made_folders import contents

Get = Callable[[str], Made]
Change = Callable[[Tensors, dict[str, Any]], None]
LOGITS = 2e-5
PROGRAM = Path(__file__).with_name("megatron_shards.py")


def test_there_and_back_again(case: str, made: Get, tmp_path: Path) -> None:
    one = made(case)
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    convert(ConversionRequest(to_mcore=True, adapters=[one.adapter], model=one.base), output_dir=mcore, verify=True)
    convert(
        ConversionRequest(to_hf=True, adapters=[mcore]), output_dir=back, verify=True
    )  # the base's config.json lies beside
    found, source = contents(back), contents(one.adapter)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert found[name] == source[name], name
    convert(ConversionRequest(to_mcore=True, adapters=[back], model=one.base), output_dir=tmp_path / "again")
    first, second = contents(mcore), contents(tmp_path / "again")
    del first["megabatch-manifest.json"], second["megabatch-manifest.json"]
    assert first == second


def test_ours_merges_into_the_same_bits_as_pefts(case: str, made: Get, tmp_path: Path) -> None:
    one = made(case)
    convert(ConversionRequest(to_mcore=True, adapters=[one.adapter], model=one.base), output_dir=tmp_path / "mcore")
    outputs = []
    for adapter in (one.adapter, tmp_path / "mcore"):
        outputs.append(tmp_path / f"from-{adapter.name}")
        convert(
            ConversionRequest(to_hf=True, model=one.base, adapters=[adapter], merge_lora=True), output_dir=outputs[-1]
        )
    first, second = (contents(output)["model.safetensors"] for output in outputs)
    assert first == second


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ("llama-shared", (2, 4, 24)),  # [layers, rank, columns]: q, k and v share A
        ("llama", (2, 12, 24)),  # each has its own: their ranks are added up
        ("qwen3-one-layer", (4, 24)),  # q and v in one layer of two
    ],
)
def test_fused_layers_share_a_where_they_can(case: str, shape: tuple[int, ...], made: Get, tmp_path: Path) -> None:
    one = made(case)
    convert(ConversionRequest(to_mcore=True, adapters=[one.adapter], model=one.base), output_dir=tmp_path / "mcore")
    entries = TorchDistFolder(tmp_path / "mcore" / "release").entries
    layer = ".1" if len(shape) == 2 else ""
    assert entries[f"decoder.layers{layer}.self_attention.linear_qkv.lora_A.weight"].size == shape
    rows = 48
    assert entries[f"decoder.layers{layer}.self_attention.linear_qkv.lora_B.weight"].size[-2:] in (
        (rows, shape[-2]), (64, shape[-2]),
    )  # fmt: skip


@pytest.mark.parametrize("case", ["moe-fused", "moe-one-by-one", "moe-shared", "moe-down-only", "mixtral-fused"])
@pytest.mark.parametrize("peft_format", ["per_expert", "fused"])
@pytest.mark.parametrize("through", ["peft", "mcore"])
def test_both_layouts_of_experts_mean_the_same(
    case: str, peft_format: str, through: str, made: Get, tmp_path: Path
) -> None:
    one, adapter = made(case), made(case).adapter
    if through == "mcore":
        adapter = tmp_path / "mcore"
        convert(ConversionRequest(to_mcore=True, adapters=[one.adapter], model=one.base), output_dir=adapter)
    out = tmp_path / "out"
    convert(ConversionRequest(to_hf=True, adapters=[adapter], model=one.base, peft_format=peft_format), output_dir=out)
    names = load_file(out / "adapter_model.safetensors")
    assert any(".experts.0." in name for name in names) == (peft_format == "per_expert")
    config = json.loads((out / "adapter_config.json").read_text())
    assert bool(config.get("target_parameters")) == (peft_format == "fused")
    convert(
        ConversionRequest(to_hf=True, model=one.base, adapters=[out], merge_lora=True), output_dir=tmp_path / "merged"
    )
    assert (logits_of(tmp_path / "merged") - one.logits).abs().max() < LOGITS
    assert (logits(load(one.base, out)) - one.logits).abs().max() < LOGITS


def scaled(**values: Any) -> Change:
    """Other scales, and ranks as the tensors have them."""
    return lambda _, given: given.update(values)


def unequal_ranks(tensors: Tensors, given: dict[str, Any]) -> None:
    """Up projections of rank 1, where the others have 2."""
    for name in tensors:
        if ".up_proj." in name:
            tensors[name] = (tensors[name][:1] if "lora_A" in name else tensors[name][:, :1]).contiguous()
    given.update(rank_pattern={"up_proj": 1}, alpha_pattern={"up_proj": 1.5})


SCALED: dict[str, Change] = {
    "rank-stabilised": scaled(use_rslora=True),
    "an alpha of experts": scaled(alpha_pattern={r"mlp\.experts\.\d+\..*": 7}),
    "an alpha of a layer": scaled(alpha_pattern={r".*layers\.1\.mlp.*": 5}, use_rslora=True),
    "an alpha of down": scaled(alpha_pattern={r".*\.3\.down_proj|.*\.[012]\.down_proj": 9}),
    "ranks": unequal_ranks,
}


@pytest.mark.parametrize("change", SCALED)
@pytest.mark.parametrize("peft_format", ["per_expert", "fused"])
def test_peft_computes_what_the_config_says_of_single_experts(
    change: str, peft_format: str, made: Get, tmp_path: Path
) -> None:
    """The source's own folder PEFT 0.21 would load as another model, which is said of it when it is given back."""
    one = made("moe-one-by-one")
    adapter = changed(one.adapter, tmp_path / "adapter", SCALED[change])
    out, merged = tmp_path / "out", tmp_path / "merged"
    convert(ConversionRequest(to_hf=True, adapters=[adapter], model=one.base, peft_format=peft_format), output_dir=out)
    convert(ConversionRequest(to_hf=True, adapters=[adapter], model=one.base, merge_lora=True), output_dir=merged)
    expected = merged_by_hand(one.base, adapter)
    assert (logits(load(one.base, out)) - logits_of(expected)).abs().max() < LOGITS
    assert (logits_of(merged) - logits_of(expected)).abs().max() < LOGITS
    assert (
        main(["--to_hf", "--adapters", str(adapter), "--model", str(one.base), "--output_dir", str(tmp_path / "as")])
        == 0
    )
    assert contents(tmp_path / "as")["adapter_config.json"] == contents(adapter)["adapter_config.json"]


def merged_by_hand(base: Path, adapter: Path) -> Path:
    """The base with every module's adapter added, by the definition of rank, alpha and patterns."""
    tensors = load_file(base / "model.safetensors")
    lora, config = tensors_of(adapter), json.loads((adapter / "adapter_config.json").read_text())
    for name in [name for name in lora if "lora_A" in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
        alphas = [v for k, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", module)]
        root = math.sqrt(len(a)) if config["use_rslora"] else len(a)
        added = [*alphas, config["lora_alpha"]][0] / root * (b @ a)
        tensors[f"{module}.weight"] = (tensors[f"{module}.weight"].double() + added).float()
    folder = adapter.with_name("by-hand")
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_scales_that_no_joined_layer_has_are_refused(made: Get, tmp_path: Path) -> None:
    one = made("moe-one-by-one")
    for number, alphas in enumerate(({"gate_proj": 7}, {r".*\.2\.down_proj": 7})):
        adapter = changed(one.adapter, tmp_path / f"adapter{number}", scaled(alpha_pattern=alphas))
        with pytest.raises(ConversionError, match=r"PEFT 0\.21 would load it as a different model: .*cannot have"):
            convert(
                ConversionRequest(to_hf=True, adapters=[adapter], model=one.base, peft_format="per_expert"),
                output_dir=tmp_path / "out",
            )


@pytest.mark.parametrize("peft_format", ["per_expert", "fused"])
def test_a_dense_layer_beside_experts_keeps_its_adapter_in_peft(peft_format: str, made: Get, tmp_path: Path) -> None:
    one = made("moe-dense-beside")
    out, merged = tmp_path / "out", tmp_path / "merged"
    convert(
        ConversionRequest(to_hf=True, adapters=[one.adapter], model=one.base, peft_format=peft_format), output_dir=out
    )
    convert(ConversionRequest(to_hf=True, adapters=[one.adapter], model=one.base, merge_lora=True), output_dir=merged)
    assert (logits(load(one.base, out)) - logits_of(merged)).abs().max() < LOGITS


@pytest.mark.parametrize("case", ["qwen3-router", "router-and-parameter"])
def test_a_router_alone_comes_back(case: str, made: Get, tmp_path: Path) -> None:
    """It is a parameter of its module in transformers 5, with or without adapters of experts."""
    test_there_and_back_again(case, made, tmp_path)


def test_one_layout_and_back_is_the_other_byte_for_byte(made: Get, tmp_path: Path) -> None:
    """Where gate and up share A nothing grows; the config's patterns have more in them then."""
    one = made("moe-shared")
    convert(
        ConversionRequest(to_hf=True, adapters=[one.adapter], model=one.base, peft_format="fused"),
        output_dir=tmp_path / "fused",
    )
    convert(
        ConversionRequest(to_hf=True, adapters=[tmp_path / "fused"], model=one.base, peft_format="per_expert"),
        output_dir=tmp_path / "one",
    )
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (one.adapter / name).read_bytes()


@pytest.fixture(scope="module")
def by_megatron(made: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`CASE/tp2`: adapters that megatron-core saved from two tensor-parallel ranks' shards, and `CASE/loaded.pt`:
    what it loads from our checkpoint. One process, because importing megatron-core takes seconds."""
    root = tmp_path_factory.mktemp("megatron")
    jobs = []
    for case in ("llama-shared", "moe-shared"):
        one = made(case)
        convert(
            ConversionRequest(to_mcore=True, adapters=[one.adapter], model=one.base), output_dir=root / case / "ours"
        )
        jobs.append([str(one.adapter), str(one.base), str(root / case)])
    path = os.pathsep.join([str(Path(megabatch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.parametrize("case", ["llama-shared", "moe-shared"])
def test_what_megatron_core_saves_is_read_and_what_we_write_it_loads(
    case: str, by_megatron: Path, made: Get, tmp_path: Path
) -> None:
    """Fused by hand from PEFT's tensors, without the converters' tables."""
    one = made(case)
    for spelling in ("tp2", "bridge"):
        saved = by_megatron / case / spelling
        (saved / "adapter_config.json").write_bytes((one.adapter / "adapter_config.json").read_bytes())
        convert(ConversionRequest(to_hf=True, adapters=[saved], model=one.base), output_dir=tmp_path / spelling)
        name = "adapter_model.safetensors"
        assert (tmp_path / spelling / name).read_bytes() == (one.adapter / name).read_bytes()
    loaded: dict[str, list[torch.Tensor]] = torch.load(by_megatron / case / "loaded.pt")
    assert len(loaded) > 10
    for name, (found, wanted) in loaded.items():
        assert torch.equal(found, wanted), name


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "adapter_model.safetensors")
