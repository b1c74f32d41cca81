"""Folders as peft itself saves them: of classifiers, of grown vocabularies, beside a base that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from made_adapters import _BASE, IDS, changed, logits_of
from safetensors.torch import load_file, save_file

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.command import main
from megabatch.errors import ConversionError

LOGITS = 2e-5
SAVED: dict[str, tuple[bool, dict[str, Any]]] = {
    "both": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "one": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "none": (False, {"target_modules": ["q_proj"]}),
    "low rank": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied, both": (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, one": (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied, none": (True, {"target_modules": ["q_proj"]}),
}


def grown(folder: Path, *, tied: bool, lora: dict[str, Any]) -> torch.Tensor:
    """`small`, a model of 60 rows; `base`, the same with 64; `adapter`, trained on that. Returns the logits."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_BASE, tie_word_embeddings=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "small")
    model.resize_token_embeddings(64)
    model.save_pretrained(folder / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "small")
    model.resize_token_embeddings(64)
    model.load_state_dict(load_file(folder / "base" / "model.safetensors"), strict=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **lora))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3 if "lora_" in name else 0.2)
    adapted.save_pretrained(folder / "adapter")
    with torch.no_grad():
        result: torch.Tensor = adapted.eval()(IDS).logits
    return result


@pytest.mark.parametrize("case", SAVED)
def test_an_adapter_of_a_grown_vocabulary(case: str, tmp_path: Path) -> None:
    tied, lora = SAVED[case]
    expected = grown(tmp_path, tied=tied, lora=lora)
    adapter = tmp_path / "adapter"
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "base", adapters=[adapter], merge_lora=True),
        output_dir=tmp_path / "merged",
    )
    assert (logits_of(tmp_path / "merged") - expected).abs().max() < LOGITS
    for merge in (True, False):
        with pytest.raises(
            ConversionError, match=r"resize the base first, by 4 to 64 \(model.resize_token_embeddings\(64\)"
        ):
            convert(
                ConversionRequest(to_mcore=True, model=tmp_path / "small", adapters=[adapter], merge_lora=merge),
                output_dir=tmp_path / "o",
            )
    convert(
        ConversionRequest(to_mcore=True, model=tmp_path / "base", adapters=[adapter]), output_dir=tmp_path / "mcore"
    )
    convert(ConversionRequest(to_hf=True, adapters=[tmp_path / "mcore"]), output_dir=tmp_path / "back")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert after.keys() == {name for name in before if "modules_to_save" not in name and "original_mod" not in name}
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_copy_that_is_none_is_refused(tmp_path: Path) -> None:
    grown(tmp_path, tied=False, lora=SAVED["both"][1])
    name = "base_model.model.lm_head.modules_to_save.weight"

    def other_numbers(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        tensors[name] += 1

    other = changed(tmp_path / "adapter", tmp_path / "other", other_numbers)
    with pytest.raises(ConversionError, match=r"lm_head.modules_to_save.weight .*: differs from .*lm_head.weight, of"):
        convert(
            ConversionRequest(to_hf=True, model=tmp_path / "base", adapters=[other], merge_lora=True),
            output_dir=tmp_path / "out",
        )


def test_a_classifiers_adapter(tmp_path: Path) -> None:
    """peft names `classifier` and `score` to save, of which a model has one."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_BASE, num_labels=3, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    )
    torch.nn.init.normal_(adapted.base_model.model.score.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier",
        "score",
    ]
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "base", adapters=[tmp_path / "adapter"], merge_lora=True),
        output_dir=tmp_path / "m",
    )
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        assert (merged.eval()(IDS).logits - expected).abs().max() < LOGITS
    convert(
        ConversionRequest(to_mcore=True, model=tmp_path / "base", adapters=[tmp_path / "adapter"]),
        output_dir=tmp_path / "mcore",
    )
    convert(ConversionRequest(to_hf=True, adapters=[tmp_path / "mcore"]), output_dir=tmp_path / "back")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()

    with pytest.raises(ConversionError, match="load the base with AutoModelForSequenceClassification, save it"):
        causal = tmp_path / "causal"
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**_BASE)).save_pretrained(causal)
        convert(
            ConversionRequest(to_mcore=True, model=causal, adapters=[tmp_path / "adapter"]), output_dir=tmp_path / "o"
        )

    def no_score(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        del tensors["base_model.model.score.weight"]

    other = changed(tmp_path / "adapter", tmp_path / "other", no_score)
    with pytest.raises(ConversionError, match="names score in modules_to_save, but no tensor belongs to it"):
        convert(ConversionRequest(to_mcore=True, model=tmp_path / "base", adapters=[other]), output_dir=tmp_path / "o")


@pytest.mark.parametrize("way", ["to_mcore", "to_hf"])
def test_the_base_that_an_adapter_names_is_merged_into(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown(tmp_path, tied=False, lora=SAVED["none"][1])
    adapter = changed(
        tmp_path / "adapter",
        tmp_path / "named",
        lambda _, config: config.update(base_model_name_or_path=str(tmp_path / "base")),
    )
    flags = [f"--{way}", "--merge_lora", "--adapters"]
    assert main([*flags, str(adapter), "--output_dir", str(tmp_path / "out")]) == 0
    convert(
        ConversionRequest(**{way: True}, model=tmp_path / "base", adapters=[adapter], merge_lora=True),
        output_dir=tmp_path / "same",
    )
    for path in (tmp_path / "same").rglob("*"):
        if path.is_file() and "manifest" not in path.name:
            assert (tmp_path / "out" / path.relative_to(tmp_path / "same")).read_bytes() == path.read_bytes()
    for number, (name, message) in enumerate(
        [
            ("no/where", "base_model_name_or_path: no/where: there is no folder"),
            (None, "names no base_model_name_or_path"),
        ]
    ):
        other = changed(
            adapter,
            tmp_path / f"other{number}",
            lambda _, config, name=name: config.update(base_model_name_or_path=name),
        )
        assert main([*flags, str(other), "--output_dir", str(tmp_path / "o")]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("initial", ["mica", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_as_it_was_changes_nothing(initial: str, tmp_path: Path) -> None:
    """Which peft repeats whenever it loads such an adapter."""
    expected = grown(tmp_path, tied=False, lora={"target_modules": ["q_proj"]})
    adapter = changed(
        tmp_path / "adapter", tmp_path / "named", lambda _, config: config.update(init_lora_weights=initial)
    )
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(peft.PeftModel.from_pretrained(base, adapter).eval()(IDS).logits, expected)
    convert(
        ConversionRequest(to_hf=True, model=tmp_path / "base", adapters=[adapter], merge_lora=True),
        output_dir=tmp_path / "merged",
    )
    assert (logits_of(tmp_path / "merged") - expected).abs().max() <= LOGITS


def test_shards_without_an_index_are_read_when_they_are_complete(tmp_path: Path) -> None:
    grown(tmp_path, tied=False, lora=SAVED["none"][1])
    tensors, folder = load_file(tmp_path / "base" / "model.safetensors"), tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    names = sorted(tensors)
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / f"model-{number + 1:05d}-of-00003.safetensors", {"format": "pt"})
    for name, model in (("one", folder), ("other", tmp_path / "base")):
        convert(ConversionRequest(to_mcore=True, model=model), output_dir=tmp_path / name)
    first, other = (sorted((tmp_path / name).rglob("*.distcp")) for name in ("one", "other"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in other]
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"not all shards, and no model.safetensors.index.json"):
        convert(ConversionRequest(to_mcore=True, model=folder), output_dir=tmp_path / "out")
