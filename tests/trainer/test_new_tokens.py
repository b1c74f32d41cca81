"""New special tokens: the same rows at every layout, and a folder that transformers and peft read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from rank_server import RankServer
from runs import curve, evaluations, recipe, train, with_fields, write_run
from safetensors.torch import load_file

from megabatch import Model, Recipe
from megabatch.config.run import RunConfig
from megabatch.converters import ConversionRequest, convert
from megabatch.data import run_tokenizer
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.tokens import new_tokens

TOKENS = ("<sum>", "</sum>", "<plus>", "<loc_1>", "<loc_10>")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2_sp_pp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models with as many rows as their tokenizer has tokens: by name, with and without tied embeddings."""
    from megabatch.data.tokens.tokenizer import load, train_bpe

    made = {}
    for name, tied in (("untied", False), ("tied", True)):
        folder = made[name] = tmp_path_factory.mktemp(name)
        train_bpe(["a small text"], vocab_size=300, out_dir=folder)
        config = transformers.AutoConfig.for_model(
            "qwen3",
            vocab_size=len(load(folder)),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            initializer_range=0.2,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(5)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return made


def _recipe(folder: Path, base: Path, layout: str = "single", /, **groups: dict[str, Any]) -> Recipe:
    """Sums written with the new tokens."""
    world, parallel = LAYOUTS[layout]
    made = recipe(folder, "qwen3", parallel=parallel, resources={"tasks_per_node": world})
    for path in map(Path, (*made.data.dataset, *made.data.val_dataset)):
        text = path.read_text().replace(" + ", "<plus>").replace("It is ", "<sum>").replace('."}', '</sum>"}')
        path.write_text(text)
    model = Model(model=str(base), torch_dtype="float32", new_special_tokens=TOKENS)
    return with_fields(replace(made, model=model), **groups)


def export(run_dir: str, target: str) -> int:
    """Saves the run's model before its first step; the rows of its padded vocabulary."""
    from megabatch.trainer import assemble
    from megabatch.trainer.exports.hugging_face import hugging_face_export
    from megabatch.trainer.model_source import model_source

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        hugging_face_export(run, source).save(engine.model, ranks, Path(target))
        return engine.model.padded_vocab_size


def padding(run_dir: str) -> list[float]:
    """The largest number in the rows of padding that this rank has, for each tensor of its newest checkpoint."""
    from megabatch.trainer import assemble
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.signals import StopSignal
    from megabatch.trainer.weights import placed

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        assert progress.step == 4
        model = loop.engine.model
        width = model.padded_vocab_size // ranks.tp_size
        known = min(width, run.shape.vocab_size - ranks.tp_rank * width)
        vocabulary = [item for item in placed(model, loop.checkpoints.table, ranks) if item.mapped.split == "vocab"]
        return [float(item.parameter.detach()[known:].abs().max()) for item in vocabulary if known < width]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_new_rows_are_the_mean_of_the_others(
    kind: str, layout: str, bases: dict[str, Path], ranks: RankServer, tmp_path: Path
) -> None:
    run = write_run(_recipe(tmp_path, bases[kind], layout), tmp_path / "run")
    (target := tmp_path / "exported").mkdir()
    padded = ranks.run(export, world_size=LAYOUTS[layout][0], run_dir=str(run), target=str(target))
    before, after = _tensors(bases[kind]), _tensors(target)
    assert before.keys() == after.keys()
    old = len(before["model.embed_tokens.weight"])
    rows = old + len(TOKENS)
    assert set(padded) == {rows + (rows % 2 if layout != "single" else 0)} and rows % 2
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        if len(after[name]) > len(tensor):
            assert torch.equal(after[name][old:], tensor.double().mean(0).float().expand(len(TOKENS), -1)), name
    grown = transformers.AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32)
    torch.manual_seed(0)
    grown.resize_token_embeddings(rows)  # which adds noise
    own = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert own.config.vocab_size == rows
    for one, other in zip(own.parameters(), grown.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == list(range(old, rows))
    assert set(TOKENS) <= set(tokenizer.all_special_tokens) and len(tokenizer) == rows


def _loss(model: Any, run: Path) -> float:
    """The mean loss of a run's validation data."""
    caches = [TokenCache.open(path) for path in (run / "cache").iterdir() if path.is_dir()]
    validation = min(caches, key=len)
    total = weight = 0.0
    with torch.no_grad():
        for sample in (validation[i] for i in range(len(validation))):
            ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
            logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            weights = torch.from_numpy(sample.weights[1:].copy()).double()
            total, weight = total - float((logps * weights).sum()), weight + float(weights.sum())
    return total / weight


def test_they_are_learned_and_the_run_resumes_exactly(
    bases: dict[str, Path], ranks: RankServer, tmp_path: Path
) -> None:
    curves, runs = {}, {}
    for layout, (world, _) in LAYOUTS.items():
        runs[layout] = write_run(_recipe(tmp_path, bases["untied"], layout), tmp_path / layout)
        stopped = {"stop_after": 2} if layout != "single" else {}
        assert len(set(ranks.run(train, world_size=world, run_dir=str(runs[layout]), **stopped))) == 1
        if stopped:
            assert set(ranks.run(train, world_size=world, run_dir=str(runs[layout]))) == {0}
        curves[layout] = curve(runs[layout])
    assert [step for step, _, _ in curves["single"]] == [1, 2, 3, 4]
    for one, other in zip(*curves.values(), strict=True):
        assert one == pytest.approx(other, rel=2e-5)
    run = runs["tp2_sp_pp2"]
    paddings = [found for one in ranks.run(padding, world_size=4, run_dir=str(run)) for found in one]
    assert paddings == [0.0, 0.0], "the rows of embedding and output layer behind the vocabulary"
    checkpoint = run / "checkpoints" / "step_00000004"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint / "hf", dtype=torch.float32)
    assert evaluations(run)[-1][1] == pytest.approx(_loss(model, run), rel=1e-5)
    before = transformers.AutoModelForCausalLM.from_pretrained(bases["untied"]).model.embed_tokens.weight
    after = model.model.embed_tokens.weight
    learned = [not torch.allclose(row, before.mean(0), atol=1e-3) for row in after[len(before) :]]
    assert learned[:3] == [True] * 3, "the tokens that the data has"
    shutil.rmtree(checkpoint / "hf")
    convert(ConversionRequest(to_hf=True, mcore_model=checkpoint), output_dir=tmp_path / "converted")
    converted = _tensors(tmp_path / "converted")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in converted.items())
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["vocab_size"] == len(after)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "converted")) == len(after)


def test_an_adapter_with_their_rows_is_the_same_model_in_peft(
    bases: dict[str, Path], ranks: RankServer, tmp_path: Path
) -> None:
    tuner = {"tuner_type": "lora", "lora_rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    made = _recipe(tmp_path, bases["untied"], tuner=tuner, bridge={"merge_lora": False})
    run = write_run(made, tmp_path / "run")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) != [0]
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    adapter = run / "checkpoints" / "step_00000004" / "hf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["untied"], dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    assert evaluations(run)[-1][1] == pytest.approx(_loss(adapted, run), rel=1e-5)
    assert evaluations(run)[-1][1] < evaluations(run)[0][1]


def test_a_folder_in_use_never_lacks_them(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay writes the folder again while the run exports from it."""
    run = RunConfig.load(write_run(_recipe(tmp_path, bases["tied"], "single"), tmp_path / "run") / "run.json")
    folder = run_tokenizer.extended(bases["tied"], run)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(token in files["tokenizer.json"].decode() for token in TOKENS)
    monkeypatch.setattr(new_tokens, "write_with", lambda *_: None)
    assert run_tokenizer.extended(bases["tied"], run) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
