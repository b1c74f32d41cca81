"""Buckets of live weights, put together again, are the Hugging Face folder byte for byte, whatever the layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import recipe, write_run
from xxhash import xxh3_64_hexdigest

from megabatch import Model
from megabatch.converters.safetensors_io import HfFolder

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2_sp_pp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
    "pp2_ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "tp2_etp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}),
    "dp2": (2, {}),
}
LIMIT = 20_000
"""Bytes: the embedding has 57,792, and a layer's matrices have some thousand each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts saved by transformers, with a tokenizer of bytes."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from megabatch.data.tokens.tokenizer import train_bpe

    torch.manual_seed(7)
    config = Qwen3MoeConfig(
        vocab_size=301, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, norm_topk_prob=True, tie_word_embeddings=False, mlp_only_layers=[1],
    )  # fmt: skip
    made = tmp_path_factory.mktemp("model") / "moe"
    Qwen3MoeForCausalLM(config).save_pretrained(made)
    train_bpe(["a small text"], vocab_size=300, out_dir=made)
    return made


def stream(run_dir: str, layout: str, limit: int) -> list[tuple[dict[str, Any], bytes]]:
    """This rank's buckets, each with its manifest as an engine would get it."""
    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.weight_buckets import export_buckets

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        table = source.family.tensors(engine.model.shape, experts=layout)  # type: ignore[arg-type]
        made = export_buckets(engine.model, table, ranks, bucket_bytes=limit)
        return [(json.loads(json.dumps(bucket.manifest())), bytes(bucket.data)) for bucket in made]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buckets_are_the_folder_at_every_layout(layout: str, folder: Path, ranks: RankServer, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    made = recipe(tmp_path, "qwen3", parallel=parallel, resources={"tasks_per_node": world_size})
    made = replace(made, model=Model(model=str(folder), torch_dtype="float32"))
    run = write_run(made, tmp_path / "run")
    for experts in ("per_expert", "fused") if layout == "pp2_ep2" else ("per_expert",):
        found = ranks.run(stream, world_size=world_size, run_dir=str(run), layout=experts, limit=LIMIT)
        tensors = put_together([bucket for buckets in found for bucket in buckets])
        source = HfFolder(folder)
        for name in source.names:
            if experts == "per_expert" or ".experts." not in name:
                dtype, shape = source.info(name)
                assert tensors.pop(name) == (dtype, list(shape), source.read(name).data), name
        for name, (_, shape, data) in tensors.items():
            assert experts == "fused", name
            assert data == fused(source, name, shape[0]), name


def put_together(buckets: list[tuple[dict[str, Any], bytes]]) -> dict[str, tuple[str, list[int], bytearray]]:
    """Tensors by name from the manifests alone; every byte must come once."""
    tensors: dict[str, tuple[str, list[int], bytearray]] = {}
    given: dict[str, int] = {}
    for manifest, data in buckets:
        assert len(data) == manifest["size"] <= LIMIT
        assert xxh3_64_hexdigest(data) == manifest["xxh3"]
        end = 0
        for part in manifest["parts"]:
            whole = torch.Size(part["shape"]).numel() * 4
            _, _, into = tensors.setdefault(part["name"], (part["dtype"], part["shape"], bytearray(whole)))
            assert part["offset"] >= end
            assert part["offset"] % 64 == 0
            end = part["offset"] + part["size"]
            expert = whole // part["shape"][0] if len(part["shape"]) == 3 else whole
            assert part["size"] == expert or expert > LIMIT, "only a tensor that is larger than a bucket is cut"
            into[part["start"] : part["start"] + part["size"]] = data[part["offset"] : end]
            given[part["name"]] = given.get(part["name"], 0) + part["size"]
    assert all(given[name] == len(data) for name, (_, _, data) in tensors.items())
    return tensors


def fused(source: HfFolder, name: str, count: int) -> bytes:
    """All experts' tensors of a layer as one, from the folder that has them apart."""
    names = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
    stem = name.rpartition(".")[0]
    return b"".join(source.read(f"{stem}.{expert}.{each}.weight").data for expert in range(count) for each in names)
