"""Models saved by transformers: the same logits, and the same bytes back, at every layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_server import RankServer
from runs import MODELS, evaluations, recipe, train, write_run
from safetensors.torch import load_file, save_file

from megabatch import Model
from megabatch.config.run import RunConfig
from megabatch.converters.families import family_of
from megabatch.converters.hf_model import read_config
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.tokens.sample import Sample
from megabatch.trainable import untrainable
from megabatch.trainer.readouts.readout import Field, Readout

COMMON: dict[str, Any] = {
    "vocab_size": 301,  # does not divide by 2: tensor parallelism pads it
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False, "rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "llama_biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral_window": ("mistral", {"tie_word_embeddings": False, "sliding_window": 5}),
    "qwen2_window": ("qwen2", {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 4,
                               "max_window_layers": 2}),
    "qwen3_window": ("qwen3", {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 3,
                               "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "qwen3_moe_window": ("qwen3_moe", {"tie_word_embeddings": False, "norm_topk_prob": True, **EXPERTS,
                                       "use_sliding_window": True, "sliding_window": 6}),
    "mixtral_window": ("mixtral", {"tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2,
                                   "sliding_window": 2}),
    "mixtral": ("mixtral", {"tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1000000.0}),
    "qwen2_one_group": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3_one_group": ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen3_biased": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {"tie_word_embeddings": False, "norm_topk_prob": True, **EXPERTS}),
    "qwen3_moe_mixed": ("qwen3_moe", {"tie_word_embeddings": True, "norm_topk_prob": False, "mlp_only_layers": [1],
                                      **EXPERTS}),
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp_pp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_etp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}),
    "dp2": (2, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models saved by transformers, biases and norms random too, with a tokenizer of bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megabatch.data.tokens.tokenizer import train_bpe

    base = tmp_path_factory.mktemp("models")
    made = {}
    for name, (kind, fields) in CASES.items():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **fields}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0, 0.2)
        made[name] = base / name
        model.save_pretrained(made[name], max_shard_size="60KB")
        train_bpe(["a small text"], vocab_size=300, out_dir=made[name])
    return made


@dataclass(frozen=True)
class Logits(Readout):
    """What the model gives, as it is."""

    width: int
    """Of this rank's vocabulary."""

    @property
    def fields(self) -> dict[str, Field]:
        return {"logits": Field("token", (self.width,))}

    def __call__(self, output: torch.Tensor, pack: Any, split: Any) -> dict[str, torch.Tensor]:
        return {"logits": output}


def logits(run_dir: str, ids: list[list[int]]) -> tuple[tuple[int, int], Any]:
    """(pipeline rank, tensor rank) and this rank's logits for one row of these sequences, [T, V/tp]."""
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.pack import collate

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        samples = [Sample(np.array(x, np.int32), np.ones(len(x), np.float32)) for x in ids]
        multiple = ranks.tp_size if run.recipe.parallel.sequence_parallel else 1
        width = engine.model.padded_vocab_size // ranks.tp_size
        (found,) = engine.infer([collate(samples, row_multiple=multiple)], Logits(width))
        place = (ranks.pp_rank, ranks.tp_rank)
    return place, found["logits"][: sum(map(len, ids))].numpy()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["single", "tp2_sp_pp2"])
def test_logits_equal_those_of_transformers(
    name: str, layout: str, folders: dict[str, Path], ranks: RankServer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    world_size, parallel = LAYOUTS[layout]
    run = _run(tmp_path, folders[name], world_size, parallel)
    ids = [[5, 17, 200, 3, 99, 4, 4, 250], [300, 1, 2], [42] * 20]
    parts = dict(ranks.run(logits, world_size=world_size, run_dir=str(run), ids=ids))
    assert all(np.array_equal(part, parts[0, tp]) for (_, tp), part in parts.items()), "every stage has them"
    shards = [parts[place] for place in sorted(parts) if place[0] == 0]
    found = torch.from_numpy(np.concatenate(shards, axis=1)[:, : COMMON["vocab_size"]])
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([sequence])).logits[0] for sequence in ids])
    scale = float(expected.abs().max())
    assert scale > 1, "a comparison of vanishing logits would show nothing"
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, scale)


def export(run_dir: str, target: str) -> None:
    """Loads the run's model and saves it again."""
    from megabatch.trainer import assemble
    from megabatch.trainer.exports.hugging_face import hugging_face_export
    from megabatch.trainer.model_source import model_source

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        hugging_face_export(run, source).save(engine.model, ranks, Path(target))


DENSE_LAYOUTS, EXPERT_LAYOUTS = ("tp2", "pp2", "tp2_sp_pp2", "dp2"), ("pp2", "tp2_sp_pp2", "dp2", "ep2", "tp2_etp2")
ROUND_TRIPS = [
    *((name, layout) for name in ("llama_biased", "qwen2_tied", "qwen3") for layout in DENSE_LAYOUTS),
    *((name, layout) for name in ("qwen3_moe", "qwen3_moe_mixed") for layout in EXPERT_LAYOUTS),
    ("mistral", "tp2_sp_pp2"),
    ("mixtral", "tp2_sp_pp2"),
    ("mixtral", "ep2"),
]


@pytest.mark.parametrize(("name", "layout"), ROUND_TRIPS)
def test_a_model_comes_back_byte_for_byte(
    name: str, layout: str, folders: dict[str, Path], ranks: RankServer, tmp_path: Path
) -> None:
    world_size, parallel = LAYOUTS[layout]
    run = _run(tmp_path, folders[name], world_size, parallel, max_shard_size="50KB")
    target = tmp_path / "exported"
    target.mkdir()
    ranks.run(export, world_size=world_size, run_dir=str(run), target=str(target))
    before, after = _tensors(folders[name]), _tensors(target)
    assert sorted(after) == sorted(before)
    for tensor, value in before.items():
        assert torch.equal(after[tensor], value), tensor
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert {p.name for p in target.glob("*.safetensors")} == set(index["weight_map"].values())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)[1]
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(target)) > 250


def test_fused_experts_are_read_too(folders: dict[str, Path], ranks: RankServer, tmp_path: Path) -> None:
    """transformers 5 holds experts as one 3-D tensor; a folder saved that way trains the same model."""
    tensors = _tensors(folders["qwen3_moe"])
    fused = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(COMMON["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = range(EXPERTS["num_experts"])
        gate_up = [torch.cat([tensors[f"{prefix}{e}.{x}_proj.weight"] for x in ("gate", "up")]) for e in experts]
        fused[f"{prefix}gate_up_proj"] = torch.stack(gate_up)
        fused[f"{prefix}down_proj"] = torch.stack([tensors[f"{prefix}{e}.down_proj.weight"] for e in experts])
    folder = tmp_path / "fused"
    folder.mkdir()
    for path in folders["qwen3_moe"].iterdir():
        if "safetensors" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(fused, folder / "model.safetensors")
    run = _run(tmp_path, folder, 2, {"expert_model_parallel_size": 2})
    target = tmp_path / "exported"
    target.mkdir()
    ranks.run(export, world_size=2, run_dir=str(run), target=str(target))
    assert all(torch.equal(value, _tensors(target)[name]) for name, value in tensors.items())


def test_a_model_made_on_the_spot_does_not_depend_on_the_layout(ranks: RankServer, tmp_path: Path) -> None:
    exported = []
    for world_size, parallel in ((1, {}), LAYOUTS["tp2_sp_pp2"]):
        made = recipe(tmp_path, "qwen3_moe", parallel=parallel, resources={"tasks_per_node": world_size})
        run = write_run(made, tmp_path / f"run{world_size}")
        target = tmp_path / f"exported{world_size}"
        target.mkdir()
        ranks.run(export, world_size=world_size, run_dir=str(run), target=str(target))
        exported.append(_tensors(target))
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[1][name], value) for name, value in exported[0].items())


def _run(tmp_path: Path, folder: Path, world_size: int, parallel: dict[str, Any], **checkpoint: Any) -> Path:
    made = recipe(
        tmp_path, "qwen3", parallel=parallel, checkpoint=checkpoint, resources={"tasks_per_node": world_size}
    )
    return write_run(replace(made, model=Model(model=str(folder), torch_dtype="float32")), tmp_path / "run")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("task", ["sft", "pt"])
@pytest.mark.parametrize("layout", ["single", "tp2_sp_pp2"])
def test_the_last_validation_loss_is_that_of_the_exported_model_in_transformers(
    task: str, layout: str, ranks: RankServer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    world_size, parallel = LAYOUTS[layout]
    made = recipe(tmp_path, "qwen3_moe", parallel=parallel, resources={"tasks_per_node": world_size})
    if task == "pt":
        documents = [{"text": f"{a} and {b} make {a + b}. " * 3} for a in range(6) for b in range(5)]
        for path, rows in ((made.data.dataset[0], documents), (made.data.val_dataset[0], documents[::7])):
            Path(path).write_text("\n".join(map(json.dumps, rows)))
    run = write_run(replace(made, task=task), tmp_path / "run")
    assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {0}
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_00000004" / "hf", dtype=torch.float32)
    caches = [TokenCache.open(path) for path in (run / "cache").iterdir() if path.is_dir()]
    validation = min(caches, key=len)
    total = weight = 0.0
    with torch.no_grad():
        for sample in (validation[i] for i in range(len(validation))):
            ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
            logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            weights = torch.from_numpy(sample.weights[1:].copy()).double()
            total, weight = total - float((logps * weights).sum()), weight + float(weights.sum())
    if task == "pt":
        assert weight == sum(len(validation[i].ids) - 1 for i in range(len(validation)))
    assert evaluations(run)[-1][1] == pytest.approx(total / weight, rel=1e-5)


def test_every_family_of_the_trainer_is_covered(folders: dict[str, Path]) -> None:
    shapes = [family_of(config := read_config(folder)).shape(config) for folder in folders.values()]
    trained = {shape.model_type for shape in shapes if untrainable(shape) is None}
    assert trained == {kind for kind, _ in CASES.values()} >= set(MODELS)
