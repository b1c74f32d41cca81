"""Families that are converted only: megatron-core's model, filled through the table, gives transformers' logits.

The families that are trained are compared by the trainer's own tests, at several layouts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import CASES

import megabatch
from megabatch.converters.hf_model import open_hf_model
from megabatch.converters.torch_dist.keys import cell, extra_states, stacks_layers

PROGRAM = Path(__file__).with_name("mcore_logits.py")
IDS = np.array([5, 17, 20, 3, 59, 4, 4, 25, 40, 41, 42])
# Short sequences, so that windows do not matter, and plain rotary embeddings: neither is the table's matter.
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_EVEN = {"hidden_size": 36, "head_dim": 8, "rope_parameters": _PLAIN}
_GLM = {**_EVEN, "rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5}, "routed_scaling_factor": 1.5}
_NEXT = {**_EVEN, "head_dim": 16, "rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.25}}
_LATENT = {"hidden_size": 36, "rope_parameters": _PLAIN}
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek-v2": _LATENT,
    "deepseek-v2-lite-tied": _LATENT,
    "deepseek-v3": _LATENT,
    "moonlight": {**_LATENT, "routed_scaling_factor": 2.446},
    "glm4-moe": _GLM,
    "gpt-oss": _EVEN,
    "gpt-oss-one-kv-head": _EVEN,
    "gemma3": {**_EVEN, "rope_parameters": {"full_attention": _PLAIN, "sliding_attention": _PLAIN}},
    "qwen3-next": _NEXT,
    "qwen3-next-mixed": _NEXT,
}


class Ran(NamedTuple):
    """A model in both."""

    expected: np.ndarray
    """transformers' logits, [T, V]."""
    found: np.ndarray
    """megatron-core's."""
    keys: dict[str, list[int] | None]
    """What megatron-core's model asks a checkpoint for: tensors with their shapes, other objects."""
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """One process of megatron-core for all families."""
    base = tmp_path_factory.mktemp("logits")
    np.save(base / "ids.npy", IDS)
    expected = {name: _transformers(name, base / name) for name in CHANGES}
    environment = {**os.environ, "PYTHONPATH": str(Path(megabatch.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(base / "ids.npy"), *(str(base / name) for name in CHANGES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: Ran(
            expected[name],
            np.load(base / name / "mcore_logits.npy"),
            json.loads((base / name / "mcore_keys.json").read_text()),
            base / name,
        )
        for name in CHANGES
    }


def _transformers(name: str, folder: Path) -> np.ndarray:
    """Saves a random model, biases and norms random too."""
    import torch
    import transformers

    case = CASES[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{case.prefix}Config")(**case.settings | CHANGES[name])
    model = getattr(transformers, case.model or f"{case.prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
        model.save_pretrained(folder)
        out: np.ndarray = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return out


@pytest.mark.parametrize("name", CHANGES)
def test_logits_equal_those_of_transformers(name: str, ran: dict[str, Ran]) -> None:
    scale = float(np.abs(ran[name].expected).max())
    assert scale > 1, "a comparison of vanishing logits would show nothing"
    assert float(np.abs(ran[name].found - ran[name].expected).max()) <= 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_has_all_that_megatron_core_asks_for(name: str, ran: dict[str, Ran]) -> None:
    """Keys and whole shapes. Norms are left out: Transformer Engine has other names for them than the local layers."""
    model = open_hf_model(ran[name].folder)
    stacked = stacks_layers(model.shape)
    ours: dict[str, list[int] | None] = dict.fromkeys(extra_states(model.tensors, model.shape, stacked=stacked))
    for mapped in model.tensors:
        place = cell(mapped, model.shape, stacked=stacked)
        ours[place.key] = [*place.axes, *mapped.shape]
    asked = {key: shape for key, shape in ran[name].keys.items() if "norm" not in key}
    assert len(asked) > 10
    assert {key: shape for key, shape in asked.items() if ours.get(key, 0) != shape} == {}
    tensors = {key for key, shape in ours.items() if shape is not None and "norm" not in key}
    assert tensors == {key for key, shape in asked.items() if shape is not None}
