from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.tokens import tokenizer
from megabatch.errors import DataError


def test_the_same_texts_give_the_same_files(tmp_path: Path) -> None:
    texts = ["two plus two", "four apples, five pears", "two pears"]
    folders = [tokenizer.train_bpe(iter(texts), vocab_size=280, out_dir=tmp_path / name) for name in "ab"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_it_round_trips_any_text_and_keeps_special_tokens_whole(bpe: Any) -> None:
    text = "<|im_start|>user\n日本 ü\tx<|im_end|>\n"
    ids = bpe(text)["input_ids"]
    assert bpe.decode(ids) == text
    assert ids[0] == bpe.convert_tokens_to_ids("<|im_start|>") == 1
    assert bpe.eos_token == "<|im_end|>"
    assert bpe.pad_token == "<|endoftext|>"


def test_it_is_saved_again_by_transformers(bpe: Any, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    again = tokenizer.load(tmp_path)
    assert again("two plus two")["input_ids"] == bpe("two plus two")["input_ids"]
    assert again.chat_template == bpe.chat_template


def test_faults_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"must hold tokenizer\.json, or vocab\.json and merges\.txt, or"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    with pytest.raises(DataError, match=r"cannot be read \(.*download its tokenizer\.json"):
        tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"vocab_size=100 is below .* try 259"):
        tokenizer.train_bpe(["a"], vocab_size=100, out_dir=tmp_path)
    with pytest.raises(DataError, match="needs text"):
        tokenizer.train_bpe([""], vocab_size=300, out_dir=tmp_path)


_LOADS = """
import sys
from megabatch.data.tokens import tokenizer
loaded = tokenizer.load(sys.argv[1])
unused = {"torch._dynamo", "sklearn", "transformers.generation.utils"}
print(loaded("two plus two")["input_ids"], sorted(unused & set(sys.modules)))
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=True)
model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
print([base.__name__ for base in type(model).__mro__ if "Mixin" in base.__name__ and "Gener" in base.__name__])
"""
_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny"

class Tiny(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(1, 1)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        return {}
"""


def test_tokenizers_load_without_what_generates_and_models_get_it_still(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    auto = {"AutoConfig": "tiny.TinyConfig", "AutoModelForCausalLM": "tiny.Tiny"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tiny", "auto_map": auto}))
    (tmp_path / "tiny.py").write_text(_CODE)
    said = subprocess.run(
        [sys.executable, "-c", _LOADS, str(tokenizer_folder), str(tmp_path)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ids = tokenizer.load(tokenizer_folder)("two plus two")["input_ids"]
    assert said.stdout.splitlines() == [f"{ids} []", "['GenerationMixin']"]
