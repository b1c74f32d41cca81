"""Adapters that are broken, do not fit, or say of themselves what is not so: one clear error, and no output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_adapters import Made, Tensors, changed

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.command import main
from megabatch.errors import ConversionError

Get = Callable[[str], Made]
Change = Callable[[Tensors, dict[str, Any]], None]
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
DOWN = "base_model.model.model.layers.1.mlp.experts.lora_"


def config(**values: Any) -> Change:
    """Other values in adapter_config.json."""
    return lambda _, given: given.update(values)


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor] | None, as_: str = "") -> Change:
    """Another tensor, under another name perhaps, or none."""

    def change(tensors: Tensors, _: dict[str, Any]) -> None:
        found = tensors.pop(name)
        if make is not None:
            tensors[as_ or name] = make(found).contiguous()

    return change


FAULTS: dict[str, tuple[str, Change, str]] = {
    "no lora": ("llama", config(peft_type="IA3"), "peft_type='IA3' is not supported; only LORA is"),
    "dora": ("llama", config(use_dora=True), "use_dora=True is not supported: it changes .*; merge it with peft"),
    "fan in": ("llama", config(fan_in_fan_out=True), "fan_in_fan_out=True is not supported"),
    "lora bias": ("llama", config(lora_bias=True), "lora_bias=True is not supported: .*where every adapted layer has"),
    "some tokens": ("llama", config(alora_invocation_tokens=[1]), "alora_invocation_tokens=.*cannot merge it either"),
    "tokens": ("llama", config(trainable_token_indices=[1, 2]), "trainable_token_indices=.* is not supported"),
    "replication": ("llama", config(layer_replication=[[0, 2]]), "layer_replication=.* is not supported"),
    "unknown key": ("llama", config(twice_the_scale=True), "twice_the_scale=True is not supported"),
    "pissa": ("llama", config(init_lora_weights="pissa_niter_4"), "the base model's weights were changed"),
    "bias": ("llama", config(bias="some"), "bias='some' must be one of none, all, lora_only"),
    "rank is a lie": ("llama", config(r=8), r"_proj.lora_A.weight \[4, \d+\] F32: .* gives .*_proj rank 8"),
    "rank is no number": ("llama", config(r="four"), "r='four' must be a positive number"),
    "no alpha": ("llama", config(lora_alpha=0), "lora_alpha=0 must be a positive number"),
    "a pattern's rank": ("llama", config(rank_pattern={"q_proj": 5}), "gives .*q_proj rank 5"),
    "a pattern": ("llama", config(rank_pattern={"q_(proj": 4}), r"rank_pattern: 'q_\(proj' is not a regular expr"),
    "targets": ("llama", config(target_modules=["k_proj"]), "target_modules does not name it"),
    "targets' type": ("llama", config(target_modules=[1]), "target_modules=.* must be a list of names"),
    "saved module": ("llama", config(modules_to_save=["lm_head"]), "names lm_head in modules_to_save, but"),
    "shape of A": ("llama", tensor(Q + "A.weight", lambda x: x[:, 1:]), r"\[4, 24\] is needed"),
    "shape of B": ("llama", tensor(Q + "B.weight", lambda x: x[1:]), r"\[24, 4\] is needed"),
    "no B": ("llama", tensor(Q + "B.weight", None), "its lora_B is missing"),
    "no A": ("llama", tensor(Q + "A.weight", None), "its lora_A is missing"),
    "dtype": ("llama", tensor(Q + "A.weight", lambda x: x.to(torch.int32)), "its dtype must be one of F64, F32"),
    "unknown module": (
        "llama",
        lambda tensors, _: tensors.update(
            {name.replace("q_proj", "q_project"): tensors.pop(name) for name in list(tensors) if name.startswith(Q)}
        ),
        "no linear layer or embedding model.layers.0.self_attn.q_project; the nearest is",
    ),
    "unknown layer": (
        "qwen3-one-layer",
        lambda tensors, _: tensors.update(
            {name.replace("layers.1", "layers.2"): value.clone() for name, value in tensors.items()}
        ),
        "the base model has no linear layer or embedding model.layers.2.",
    ),
    "no prefix": ("llama", tensor(Q + "A.weight", lambda x: x, "q.lora_A.weight"), "begin with base_model.model."),
    "magnitude": (
        "llama", lambda tensors, _: tensors.update({Q + "magnitude_vector": torch.ones(24)}), "DoRA is not supported"
    ),
    "a whole tensor": (
        "llama", lambda tensors, _: tensors.update({"base_model.model.model.norms.weight": torch.ones(24)}),
        "the base model has no tensor model.norms.weight; the nearest is model.norm.weight",
    ),
    "its shape": (
        "llama", lambda tensors, _: tensors.update({"base_model.model.lm_head.weight": torch.ones(61, 24)}),
        "resize the base first, by 1 to 61",
    ),
    "experts' rank": ("moe-fused", tensor(DOWN + "A.weight", lambda x: x[1:]), "gives rank 2 to each of the 4"),
    "experts' B": ("moe-fused", tensor(DOWN + "B.weight", lambda x: x[:, 1:]), r"\[24, 8\] is needed"),
    "parameters": ("moe-fused", config(target_parameters=["gate.weight"]), "no linear layer or embedding .*experts"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["convert", "merge"])
def test_faults_are_named_and_nothing_is_written(fault: str, way: str, made: Get, tmp_path: Path) -> None:
    case, change, message = FAULTS[fault]
    one = made(case)
    adapter = changed(one.adapter, tmp_path / "adapter", change)
    with pytest.raises(ConversionError, match=message) as error:
        convert(
            ConversionRequest(to_mcore=True, model=one.base, adapters=[adapter], merge_lora=way == "merge"),
            output_dir=tmp_path / "out",
        )
    assert str(adapter) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_truncated_and_pickled_weights(made: Get, tmp_path: Path) -> None:
    one = made("llama")
    adapter = changed(one.adapter, tmp_path / "adapter", lambda *_: None)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    flags = {"to_hf": True, "model": one.base, "adapters": [adapter], "merge_lora": True}
    with pytest.raises(ConversionError, match=r"adapter_model\.safetensors: truncated"):
        convert(ConversionRequest(**flags), output_dir=tmp_path / "out")
    weights.unlink()
    with pytest.raises(ConversionError, match=r"no adapter_model\.safetensors; complete the download"):
        convert(ConversionRequest(**flags), output_dir=tmp_path / "out")
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConversionError, match=r"adapter_model\.bin: is a pickle, .*megabatch-convert --accept_bin"):
        convert(ConversionRequest(**flags), output_dir=tmp_path / "out")
    with pytest.raises(ConversionError, match=r"adapter_model\.bin: no file of torch.save"):
        convert(ConversionRequest(accept_bin=True, **flags), output_dir=tmp_path / "out")
    with pytest.raises(ConversionError, match="nowhere: no such folder of an adapter"):
        convert(ConversionRequest(**{**flags, "adapters": [tmp_path / "nowhere"]}), output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_of_several_adapters_in_a_folder_one_must_be_named(made: Get, tmp_path: Path) -> None:
    one = made("llama")
    (tmp_path / "all").mkdir()
    for name in ("first", "second"):  # as peft saves all but the one called default
        changed(one.adapter, tmp_path / "all" / name, lambda *_: None)
    request = ConversionRequest(to_hf=True, model=one.base, adapters=[tmp_path / "all"], merge_lora=True)
    with pytest.raises(ConversionError, match="holds adapters in folders of their own; name one: first, second"):
        convert(request, output_dir=tmp_path / "out")


def test_adapters_that_exclude_each_other(made: Get, tmp_path: Path) -> None:
    saved, biased = made("llama-saved"), made("llama-biases")
    other = changed(
        saved.adapter, tmp_path / "other", lambda tensors, _: [x.add_(1) for x in tensors.values()] and None
    )
    for one, pair, message in (
        (saved, [saved.adapter, other], "is already replaced by an earlier adapter"),
        (biased, [biased.adapter, biased.adapter], "both change biases"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(
                ConversionRequest(to_hf=True, model=one.base, adapters=pair, merge_lora=True),
                output_dir=tmp_path / "out",
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, r"linear_qkv.weight \[48, 24\]: has adapters of rank 12, .*q_proj 3, .*k_proj 3"),
        ({"r": 12}, None),
        ({"target_modules": ["q_proj"], "r": 12}, "has adapters that adapter_config.json does not target"),
        ({"target_modules": ["o_proj"]}, r"has adapters of rank 12, adapter_config.json gives it none"),
    ],
)
def test_the_config_of_a_checkpoint_must_fit_it(
    change: dict[str, Any], message: str | None, made: Get, tmp_path: Path
) -> None:
    """A rank of 12 is that of q, k and v together, or, as a trainer may go on with it, of one that they share."""
    one = made("llama")
    changed_ = changed(one.adapter, tmp_path / "attention", _attention)
    mcore = tmp_path / "mcore"
    convert(ConversionRequest(to_mcore=True, model=one.base, adapters=[changed_]), output_dir=mcore)
    path = mcore / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if message is None:
        convert(ConversionRequest(to_hf=True, adapters=[mcore]), output_dir=tmp_path / "out")
        return
    with pytest.raises(ConversionError, match=message):
        convert(ConversionRequest(to_hf=True, adapters=[mcore]), output_dir=tmp_path / "out")
    path.unlink()
    with pytest.raises(ConversionError, match=r"there is no adapter_config.json beside this checkpoint"):
        convert(ConversionRequest(to_hf=True, adapters=[mcore], model=one.base), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _attention(tensors: Tensors, given: dict[str, Any]) -> None:
    """Leaves only q, k and v."""
    given["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    for name in [name for name in tensors if not any(part in name for part in given["target_modules"])]:
        del tensors[name]


def test_a_bias_of_a_part_cannot_be_converted_but_merged(made: Get, tmp_path: Path) -> None:
    one = made("qwen3-patterns")

    def partial(tensors: Tensors, _: dict[str, Any]) -> None:
        del tensors["base_model.model.model.layers.0.self_attn.k_proj.base_layer.bias"]

    adapter = changed(one.adapter, tmp_path / "adapter", partial)
    with pytest.raises(ConversionError, match=r"k_proj.bias is missing\); it can be merged"):
        convert(ConversionRequest(to_mcore=True, model=one.base, adapters=[adapter]), output_dir=tmp_path / "out")
    convert(
        ConversionRequest(to_mcore=True, model=one.base, adapters=[adapter], merge_lora=True),
        output_dir=tmp_path / "out",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--merge_lora", "--to_hf", "--model", "m"], "--merge_lora needs --adapters"),
        (["--adapters", "a", "--to_mcore", "--peft_format", "fused"], "--peft_format is about the adapter"),
        (["--adapters", "a", "--to_hf", "--peft_format", "both"], "--peft_format=both must be per_expert or fused"),
        (["--adapters", "a", "--to_hf", "--test_convert_precision"], "merge the adapter with --merge_lora"),
        (["--adapters"], "--adapters needs one value"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--output_dir", "o"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapters": ["a", "b"]}, "several adapters can only be merged"),
        ({"adapters": ["a"], "torch_dtype": "float32"}, "an adapter is converted as it is"),
        ({"adapters": ["a"], "merge_lora": True, "peft_format": "fused"}, "writes, converted and not merged"),
        ({"merge_lora": True}, "merge_lora needs adapters"),
    ],
)
def test_arguments_that_do_not_go_together(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(ConversionRequest(to_hf=True, model=tmp_path, **given), output_dir=tmp_path / "out")
