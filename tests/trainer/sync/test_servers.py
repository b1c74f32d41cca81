"""What a server must have before a run sends weights to it, and where its address comes from."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from megabatch.config.grpo import Rollout
from megabatch.converters.families import family_of
from megabatch.trainer.sync.open import addresses
from megabatch.trainer.sync.servers import Wanted, unfit

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 304, "hidden_size": 64, "head_dim": 32,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 1e6,
    "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip
WANTED = Wanted(
    shape=family_of(CONFIG).shape(CONFIG), dtype="bfloat16", longest=96, owner="run", device=torch.device("cpu"),
    token=None, timeout_s=1.0, group_port=0,
)  # fmt: skip
FACTS = {"model_type": "qwen3", "vocab_size": 304, "hidden_size": 64, "num_hidden_layers": 2, "dtype": "bfloat16",
         "max_model_len": 96, "vllm": "0.32.0", "lora_rank": None, "lora_layers": None}  # fmt: skip


def test_a_server_that_fits() -> None:
    assert unfit(FACTS, WANTED) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"vocab_size": 300}, "vocab_size=300, the run 304"), ({"model_type": "qwen2"}, "model_type='qwen2'"),
     ({"dtype": "float32"}, "the run 'bfloat16'"), ({"vllm": "0.24.1"}, "vLLM 0.24.1, megabatch needs 0.32"),
     ({"max_model_len": 95}, "max_model_len=95 tokens, the run needs .* = 96")],
)  # fmt: skip
def test_each_difference_is_named(changed: dict[str, object], words: str) -> None:
    (fault,) = unfit({**FACTS, **changed}, WANTED)
    assert re.search(words, fault), fault


def test_servers_for_adapters() -> None:
    wanted = replace(WANTED, lora_rank=8, lora_layers=("q_proj", "o_proj"))
    (fault,) = unfit(FACTS, wanted)
    assert "takes no adapters" in fault and "--lora_rank 8 --lora_layers q_proj,o_proj" in fault
    small = unfit({**FACTS, "lora_rank": 4, "lora_layers": ["q_proj"]}, wanted)
    assert "adapters of rank 4, the run's is 8" in small[0] and "does not adapt o_proj" in small[1]
    assert unfit({**FACTS, "lora_rank": 8, "lora_layers": ["o_proj", "q_proj"]}, wanted) == []


def test_all_differences_are_named_together() -> None:
    assert len(unfit({**FACTS, "vocab_size": 1, "dtype": "float16"}, replace(WANTED, longest=97))) == 3


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Rollout(vllm_mode="server")
    assert addresses(replace(base, vllm_server_base_url="http://a:1, http://b:2")) == ["http://a:1", "http://b:2"]
    assert addresses(replace(base, vllm_server_host="a,b", vllm_server_port=9)) == ["http://a:9", "http://b:9"]
    monkeypatch.setenv("MEGABATCH_ROLE_ROLLOUT", "http://10.0.0.3:15021,http://10.0.0.3:15022")
    assert addresses(base) == ["http://10.0.0.3:15021", "http://10.0.0.3:15022"]
