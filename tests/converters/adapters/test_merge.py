"""Merged weights against peft's own, in fp32, in bfloat16 against exact sums, and bit for bit against themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_adapters import Made, Tensors, changed, logits, logits_of
from safetensors.torch import load_file, save_file

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.command import main
from megabatch.errors import ConversionError

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from made_folders import contents

Get = Callable[[str], Made]
LOGITS = 2e-5
"""Largest difference of logits, of about 5: fp32 sums in another order."""


def weights(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


SHARED = ("llama-tied-embedding",)
"""Where peft merges into the tensor that the output layer shares, so that its merged model is another than it
trained; ours is that one."""


def check_equal(found: Tensors, expected: Tensors) -> None:
    """Both are sums of a weight and a product of rank at most 5, in fp32: each of the six roundings is at most 2^-24
    of the largest term, below 8, and the two do them in different orders."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2 * 6 * 8 * 2.0**-24, name


def test_merged_weights_equal_pefts(case: str, made: Get, tmp_path: Path) -> None:
    """On all ways: within Hugging Face's format, and into and out of megatron-core's."""
    one = made(case)
    convert(
        ConversionRequest(to_hf=True, model=one.base, adapters=[one.adapter], merge_lora=True),
        output_dir=tmp_path / "hf",
    )
    expected = weights(tmp_path / "hf") if case in SHARED else one.merged
    check_equal(weights(tmp_path / "hf"), expected)
    assert (logits_of(tmp_path / "hf") - one.logits).abs().max() < LOGITS
    convert(
        ConversionRequest(to_mcore=True, model=one.base, adapters=[one.adapter], merge_lora=True),
        output_dir=tmp_path / "mcore",
    )
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore"), output_dir=tmp_path / "back")
    check_equal(weights(tmp_path / "back"), expected)
    convert(ConversionRequest(to_mcore=True, model=one.base), output_dir=tmp_path / "base")
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "base", adapters=[one.adapter], merge_lora=True),
        output_dir=tmp_path / "out",
        verify=True,
    )
    check_equal(weights(tmp_path / "out"), expected)
    tied = json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings", False)
    assert tied == ("lm_head.weight" not in expected)


def test_fused_experts_of_the_base_model(made: Get, tmp_path: Path) -> None:
    one = made("moe-fused")
    convert(ConversionRequest(to_mcore=True, model=one.base), output_dir=tmp_path / "mcore")
    convert(
        ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore", expert_layout="fused"),
        output_dir=tmp_path / "fused",
    )
    convert(
        ConversionRequest(
            to_hf=True, model=tmp_path / "fused", adapters=[one.adapter], merge_lora=True, expert_layout="fused"
        ),
        output_dir=tmp_path / "merged",
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights(tmp_path / "merged")
    assert (logits_of(tmp_path / "merged") - one.logits).abs().max() < LOGITS


def test_experts_whose_rows_are_in_another_order(made: Get, tmp_path: Path) -> None:
    """GPT-OSS: merged on the way to megatron-core, and refused by name where that is not built."""
    one = made("gpt-oss")
    flags = {"adapters": [one.adapter], "model": one.base}
    convert(ConversionRequest(to_mcore=True, merge_lora=True, **flags), output_dir=tmp_path / "mcore")
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore"), output_dir=tmp_path / "back")
    check_equal(weights(tmp_path / "back"), one.merged)
    with pytest.raises(ConversionError, match="merge its adapter with --to_mcore"):
        convert(ConversionRequest(to_hf=True, merge_lora=True, **flags), output_dir=tmp_path / "out")
    with pytest.raises(ConversionError, match="its adapter can be merged with --to_mcore, not converted"):
        convert(ConversionRequest(to_mcore=True, **flags), output_dir=tmp_path / "out")


def test_bfloat16_is_rounded_once(made: Get, tmp_path: Path) -> None:
    """Within half a unit of the last place of the exact sum, and of peft's, which rounds twice, within what that may
    cost."""
    one = made("llama")
    base = {name: value.bfloat16() for name, value in weights(one.base).items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_bytes((one.base / "config.json").read_bytes())
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "base", adapters=[one.adapter], merge_lora=True),
        output_dir=tmp_path / "out",
    )
    found, lora = weights(tmp_path / "out"), weights(one.adapter)
    compared = 0
    for name, value in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        assert found[name].dtype == torch.bfloat16
        if f"{key}A.weight" not in lora:
            assert torch.equal(found[name], value)
            continue
        compared += 1
        delta = 6 / 4 * lora[f"{key}B.weight"].double() @ lora[f"{key}A.weight"].double()
        exact = value.double() + delta
        unit = 2.0 ** (torch.frexp(exact)[1] - 8).double()  # of bfloat16's eight bits
        single = 6 * 8 * 2.0**-24  # as in `check_equal`
        assert ((found[name].double() - exact).abs() <= unit * 0.5 + single).all()
        twice = (value + delta.float().bfloat16()).double()
        assert ((found[name].double() - twice).abs() <= unit + delta.abs() * 2.0**-8 + 2 * single).all()
    assert compared == 14


def test_pickled_adapters_are_read_as_data_when_asked_for(made: Get, tmp_path: Path) -> None:
    one = made("llama")
    (tmp_path / "pickled").mkdir()
    torch.save(weights(one.adapter), tmp_path / "pickled" / "adapter_model.bin")
    (tmp_path / "pickled" / "adapter_config.json").write_bytes((one.adapter / "adapter_config.json").read_bytes())
    flags = {"to_hf": True, "model": one.base, "merge_lora": True, "accept_bin": True}
    convert(ConversionRequest(adapters=[tmp_path / "pickled"], **flags), output_dir=tmp_path / "out")
    convert(ConversionRequest(adapters=[one.adapter], **flags), output_dir=tmp_path / "expected")
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    assert found["model.safetensors"] == expected["model.safetensors"]


def test_other_dtypes_are_written_when_asked_for(made: Get, tmp_path: Path) -> None:
    one = made("llama")
    flags = {"model": one.base, "adapters": [one.adapter], "merge_lora": True}
    convert(ConversionRequest(to_hf=True, **flags), output_dir=tmp_path / "single")
    convert(ConversionRequest(to_hf=True, torch_dtype="float16", **flags), output_dir=tmp_path / "half")
    single, half = weights(tmp_path / "single"), weights(tmp_path / "half")
    assert all(torch.equal(half[name], value.half()) for name, value in single.items())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and an adapter whose products the linear algebra library would divide among threads."""
    import peft
    import transformers

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=1100, intermediate_size=1900, num_hidden_layers=1, num_attention_heads=10,
        num_key_value_heads=5, head_dim=110,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base")
    lora = peft.LoraConfig(r=40, target_modules=["q_proj", "k_proj", "down_proj", "lm_head"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("threads", ["1", "3"])
def test_bits_do_not_depend_on_threads_workers_or_ranks(threads: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = wide
    flags = ["--merge_lora", "--adapters", str(adapter), "--to_mcore", "--model", str(base)]
    convert(
        ConversionRequest(to_mcore=True, model=base, adapters=[adapter], merge_lora=True),
        output_dir=tmp_path / "one",
        workers=1,
    )
    expected = contents(tmp_path / "one")
    for rank in ("2", "0", "1"):
        command = [sys.executable, "-m", "megabatch.converters.command", *flags, "--output_dir", tmp_path / "ranks"]
        subprocess.run(
            [*command, "--workers", "3", "--rank", rank, "--world", "3"],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads},
            check=True,
        )
    assert contents(tmp_path / "ranks") == expected


def test_an_interrupted_merge_is_resumed_to_the_same_bits(wide: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = wide
    flags = {"to_hf": True, "model": base, "adapters": [adapter], "merge_lora": True}
    convert(ConversionRequest(**flags), output_dir=tmp_path / "whole")
    convert(ConversionRequest(**flags), output_dir=tmp_path / "part", rank=1, world=2)
    with pytest.raises(ConversionError, match="left by a conversion of another source"):
        convert(
            ConversionRequest(to_hf=True, model=base, adapters=[adapter, adapter], merge_lora=True),
            output_dir=tmp_path / "part",
        )
    outcome = convert(ConversionRequest(**flags), output_dir=tmp_path / "part", resume=True)
    assert outcome.resumed
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_several_adapters_are_summed(made: Get, tmp_path: Path) -> None:
    import peft
    import transformers

    one = made("llama")

    def scaled(tensors: Tensors, config: dict[str, object]) -> None:
        config["lora_alpha"] = 3
        for name in list(tensors):
            tensors[name] = tensors[name].flip(0).contiguous() if "lora_A" in name else tensors[name]

    second = changed(one.adapter, tmp_path / "second", scaled)
    model = transformers.AutoModelForCausalLM.from_pretrained(one.base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(model, one.adapter, adapter_name="a")
    loaded.load_adapter(second, adapter_name="b")
    loaded.base_model.set_adapter(["a", "b"])
    expected = logits(loaded)
    assert (expected - one.logits).abs().max() > 0.1
    assert main(["--merge_lora", "--adapters", str(one.adapter), str(second), "--to_hf", "--model", str(one.base),
                 "--output_dir", str(tmp_path / "out")]) == 0  # fmt: skip
    assert (logits_of(tmp_path / "out") - expected).abs().max() < LOGITS


def test_block_scaled_fp8_is_made_plain_before_the_sum(made: Get, tmp_path: Path) -> None:
    one = made("llama")
    tensors = weights(one.base)
    meant = dict(tensors)
    for name in [name for name in tensors if "_proj" in name]:
        value = tensors[name]
        scale = torch.rand(-(-value.shape[0] // 128), -(-value.shape[1] // 128)) * 0.01 + 0.01
        tensors[name] = (value / 0.02).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        meant[name] = tensors[name].float() * scale  # one block
    (tmp_path / "fp8").mkdir()
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    config = json.loads((one.base / "config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    flags = {"adapters": [one.adapter], "merge_lora": True}
    convert(
        ConversionRequest(to_mcore=True, model=tmp_path / "fp8", torch_dtype="float32", **flags),
        output_dir=tmp_path / "mcore",
    )
    convert(ConversionRequest(to_hf=True, mcore_model=tmp_path / "mcore"), output_dir=tmp_path / "back")
    (tmp_path / "plain").mkdir()
    save_file(meant, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    convert(ConversionRequest(to_hf=True, model=tmp_path / "plain", **flags), output_dir=tmp_path / "expected")
    check_equal(weights(tmp_path / "back"), weights(tmp_path / "expected"))
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "fp8", torch_dtype="float32", **flags),
        output_dir=tmp_path / "hf",
    )
    assert contents(tmp_path / "hf")["model.safetensors"] == contents(tmp_path / "back")["model.safetensors"]
    with pytest.raises(ConversionError, match="fp8_quantise: merge the adapters first"):
        convert(ConversionRequest(to_hf=True, model=one.base, fp8_quantise=True, **flags), output_dir=tmp_path / "no")


def test_verification_makes_the_sums_again(made: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = made("llama")
    out = tmp_path / "out"
    flags = ["--merge_lora", "--adapters", str(one.adapter), "--to_hf", "--model", str(one.base), "--output_dir",
             str(out)]  # fmt: skip
    assert main([*flags, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj.weight [32, 24] F32, merged with adapters of rank 4" in shown.replace(
        "[24, 24]", "[32, 24]"
    )
    assert "layers.0.input_layernorm.weight [24] F32: 1 extent" in shown
    assert not out.exists()
    assert main([*flags, "--verify"]) == 0
    assert main(["--verify", "--output_dir", str(out)]) == 0
    assert main([*flags, "--verify"]) == 0
    path = out / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert main([*flags, "--verify"]) == 1
    assert "differs from its source" in capsys.readouterr().err


def test_merged_models_of_both_formats_compute_the_same(made: Get, tmp_path: Path) -> None:
    one = made("llama-tied-embedding")
    flags = ["--merge_lora", "--adapters", str(one.adapter), "--test_convert_precision"]
    assert main([*flags, "--to_mcore", "--model", str(one.base), "--output_dir", str(tmp_path / "mcore")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore"]


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("llama", "layers.1.mlp.down_proj.lora_B.weight"),
        ("llama", "layers.0.self_attn.k_proj.lora_A.weight"),
        ("moe-fused", "layers.1.mlp.experts.lora_B.weight"),
        ("llama-embeddings", "embed_tokens.lora_embedding_A"),
        ("llama-saved", "embed_tokens.weight"),
        ("qwen3-patterns", "layers.1.self_attn.v_proj.base_layer.bias"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_tensor(
    value: float, case: str, name: str, made: Get, tmp_path: Path
) -> None:
    one = made(case)

    def change(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors[f"base_model.model.model.{name}"].view(-1)[-1] = value

    shown = name.replace(".base_layer", "")
    adapter = changed(one.adapter, tmp_path / "adapter", change)
    for way in ("to_mcore", "to_hf"):
        with pytest.raises(ConversionError, match=rf"adapter: .*{shown}: has infinities or NaN"):
            convert(
                ConversionRequest(**{way: True}, model=one.base, adapters=[adapter], merge_lora=True),
                output_dir=tmp_path / "out",
            )
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    convert(ConversionRequest(to_mcore=True, model=one.base, adapters=[adapter]), output_dir=tmp_path / "mcore")
    with pytest.raises(ConversionError, match="has infinities or NaN"):
        convert(
            ConversionRequest(to_hf=True, model=one.base, adapters=[tmp_path / "mcore"], merge_lora=True),
            output_dir=tmp_path / "out",
        )


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 1e6), ("float32", 1e25)])
def test_sums_beyond_the_dtype_are_refused_by_tensor(dtype: str, factor: float, made: Get, tmp_path: Path) -> None:
    one = made("llama")

    def change(tensors: Tensors, _: dict[str, Any]) -> None:
        for name in tensors:
            if "layers.1.self_attn.o_proj" in name:
                tensors[name] *= factor

    adapter = changed(one.adapter, tmp_path / "adapter", change)
    request = ConversionRequest(to_hf=True, model=one.base, adapters=[adapter], merge_lora=True, torch_dtype=dtype)
    says = r"layers.1.self_attn.o_proj.weight \[24, 24\]: with its adapters it has"
    with pytest.raises(ConversionError, match=says):
        convert(request, output_dir=tmp_path / "out")
