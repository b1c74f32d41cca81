"""config.json, adapter_config.json and indices with other values and bytes: an error, or the right output."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_folders import contents
from safetensors.numpy import save_file
from test_mutated import MUTATIONS

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.hf_model import open_hf_model
from megabatch.errors import ConversionError

SEED = os.environ.get("MUTATION_SEED", "1")
TIMES = int(os.environ.get("MUTATION_TIMES", "60"))
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 10**30, 0.5, 1e308, float("inf"), float("nan"), "", "x",
    "(a+)+$", "..", [], [[]], [1],
    ["x"], [None], {}, {"": 1}, {"x": {}}, {"rope_type": 5}, "LlamaForCausalLM", ["LlamaForCausalLM"],
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*at, key)
        yield from places(item, (*at, key))


def with_another_value(raw: bytes, rng: random.Random) -> bytes:
    document = json.loads(raw)
    *way, last = rng.choice(list(places(document)))
    owner = document
    for key in way:
        owner = owner[key]
    if rng.random() < 0.1:
        del owner[last]
    else:
        owner[last] = rng.choice(VALUES)
    return json.dumps(document).encode()


@pytest.fixture(scope="module")
def adapter(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every linear layer, with patterns."""
    folder, rng = tmp_path_factory.mktemp("adapter"), np.random.default_rng(0)
    tensors = {}
    for name, shape in open_hf_model(hf).family.hf_tensors(open_hf_model(hf).shape).items():
        if len(shape) == 2 and "embed" not in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            rank = 3 if "q_proj" in name else 2
            tensors[f"{prefix}A.weight"] = rng.standard_normal((rank, shape[1]), np.float32)
            tensors[f"{prefix}B.weight"] = rng.standard_normal((shape[0], rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": r".*(_proj|gate|lm_head)", "bias": "none",
        "rank_pattern": {r".*\.q_proj": 3}, "alpha_pattern": {"q_proj": 6}, "modules_to_save": None,
        "layers_to_transform": None, "layers_pattern": None, "use_rslora": False, "exclude_modules": None,
        "target_parameters": None, "task_type": "CAUSAL_LM", "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def files_of_tensors(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith((".distcp", ".metadata"))}


def check(path: Path, run: Callable[[Path], None], tmp_path: Path, *, name: str) -> None:
    """Runs with a file's bytes changed: an error that is one of ours, or what comes of the file as it was."""
    original, rng = path.read_bytes(), random.Random(f"{name} {SEED}")
    run(tmp_path / "whole")
    expected = files_of_tensors(tmp_path / "whole")
    refused = 0
    for attempt in range(TIMES):
        mutation = with_another_value if attempt % 3 else rng.choice(MUTATIONS)
        mutated = mutation(original, rng)
        path.write_bytes(mutated)
        out = tmp_path / "out" / str(attempt)
        try:
            run(out)
            assert files_of_tensors(out) == expected, (attempt, mutated)
            shutil.rmtree(out)
        except ConversionError as error:
            refused += 1
            assert str(error)
            assert not out.exists()
    assert refused > TIMES / 6, refused


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_models(name: str, hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "hf")
    check(
        tmp_path / "hf" / name,
        lambda out: convert(ConversionRequest(to_mcore=True, model=tmp_path / "hf"), output_dir=out) and None,
        tmp_path,
        name=name,
    )


@pytest.mark.parametrize("base", [True, False])
def test_adapters(base: bool, hf: Path, adapter: Path, tmp_path: Path) -> None:
    """What the adapter says of itself, and what its base says."""
    shutil.copytree(hf, tmp_path / "hf")
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "hf" / "config.json" if base else tmp_path / "adapter" / "adapter_config.json"
    check(
        path,
        lambda out: (
            convert(
                ConversionRequest(to_mcore=True, model=tmp_path / "hf", adapters=[tmp_path / "adapter"]),
                output_dir=out,
            )
            and None
        ),
        tmp_path,
        name=f"adapter {base}",
    )
