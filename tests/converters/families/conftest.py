"""The models of `cases.CASES`, saved by transformers itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, Case


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """Each case in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`saved(case)`: a folder with the case's random model, made once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            _save(CASES[name], folders[name])
        return folders[name]

    return make


def _save(case: Case, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    make = getattr(transformers, f"{case.prefix}Config")
    if case.vision is None:
        config = make(**case.settings)
    else:
        tied = case.settings.get("tie_word_embeddings", False)
        config = make(text_config=case.settings, vision_config=case.vision, tie_word_embeddings=tied)
    model = getattr(transformers, case.model or f"{case.prefix}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    model.save_pretrained(folder)
    if case.mtp:
        _add_mtp(folder, layers=config.num_hidden_layers)
    if case.transposed:
        arrays = load_file(folder / "model.safetensors")
        turned = {name: a.swapaxes(1, 2).copy() for name, a in arrays.items() if ".mlp.experts." in name}
        save_file(arrays | turned, folder / "model.safetensors", {"format": "pt"})


def _add_mtp(folder: Path, *, layers: int) -> None:
    """A layer behind the last, as DeepSeek-V3 and GLM-4.5 are published: that layer's tensors, and its own."""
    arrays = load_file(folder / "model.safetensors")
    random, last, own = np.random.default_rng(1), f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    shapes = {own + name.removeprefix(last): a.shape for name, a in arrays.items() if name.startswith(last)}
    hidden = arrays["model.norm.weight"].shape[0]
    shapes |= {own + name: (hidden,) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    shapes[own + "eh_proj.weight"] = (hidden, 2 * hidden)
    added = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    added[own + "embed_tokens.weight"] = arrays["model.embed_tokens.weight"]
    added[own + "shared_head.head.weight"] = arrays.get("lm_head.weight", arrays["model.embed_tokens.weight"])
    save_file(arrays | added, folder / "model.safetensors")
