"""Runs whose reference a recipe names: its log-probabilities are those of that model in transformers, in fp64."""

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
from runs import recipe_on, train, with_fields, write_run

from megabatch import Model, MoE, Recipe
from megabatch.config.run import RunConfig
from megabatch.converters import ConversionRequest, convert
from megabatch.data.cache.reference_key import reference_key
from megabatch.data.rows.digests import Digests
from megabatch.data.tokens.tokenizer import train_bpe
from megabatch.ledger.reader import Reader
from megabatch.run_directory import RunDirectory
from megabatch.saved.manifest import MANIFEST, read_manifest

LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RUNS: dict[str, tuple[str, int, str, dict[str, dict[str, Any]]]] = {
    "dpo ref_model": ("dpo", 2, "other", {
        "bridge": {"ref_model": "other"}, "rlhf": {"ref_tensor_model_parallel_size": 2}}),
    "dpo ref_load": ("dpo", 2, "other", {"parallel": TP2, "rlhf": {
        "ref_load": "other_mcore", "ref_tensor_model_parallel_size": 1, "ref_pipeline_model_parallel_size": 2}}),
    "dpo lora ref_model": ("dpo", 1, "other", {"tuner": LORA, "bridge": {"ref_model": "other"}}),
    "kto ref_adapters": ("kto", 1, "adapted", {"bridge": {"ref_adapters": ["adapter"]}}),
    "kto lora ref_adapter_load": ("kto", 2, "adapted", {
        "tuner": LORA, "parallel": TP2, "rlhf": {"ref_adapter_load": "adapter_mcore"}}),
    "grpo ref_model": ("grpo", 2, "other", {
        "bridge": {"ref_model": "other"}, "rlhf": {"ref_tensor_model_parallel_size": 2}}),
    "grpo ref_load": ("grpo", 1, "other", {"rlhf": {"ref_load": "other_mcore"}}),
    "grpo lora ref_adapters": ("grpo", 1, "adapted", {"tuner": LORA, "bridge": {"ref_adapters": ["adapter"]}}),
}  # fmt: skip
"""Task, ranks, which model the reference is, and the recipe's groups with names of folders."""


def made_model(folder: Path, *, seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, another model and an adapter of the policy, in both formats; pairs, which are labelled answers too."""
    folder = tmp_path_factory.mktemp("references")
    made_model(folder / "other", seed=2)
    adapted = peft.get_peft_model(
        made_model(folder / "policy", seed=1), peft.LoraConfig(r=3, target_modules="all-linear")
    )
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0.0, 0.1)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    adapted.merge_and_unload().save_pretrained(folder / "adapted")
    convert(ConversionRequest(to_mcore=True, model=folder / "other"), output_dir=folder / "other_mcore")
    request = ConversionRequest(
        to_mcore=True, adapters=[folder / "adapter"], model=folder / "policy", merge_lora=False
    )
    convert(request, output_dir=folder / "adapter_mcore", verify=True)
    rows = [{"query": f"{n} + 7?", "response": str(n + 7), "rejected_response": f"It is {n} or so"} for n in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    return folder


def made(folder: Path, name: str) -> Recipe:
    task, world, _, groups = RUNS[name]
    there = {group: {key: _path(folder, key, value) for key, value in some.items()} for group, some in groups.items()}
    there["rlhf"] = {"rlhf_type": task, "share_prompts": False, **there.get("rlhf", {})}
    found = recipe_on(
        folder,
        "qwen3",
        **there,
        data={"val_dataset": []},
        grpo={"reward_funcs": [f"{folder / 'reward.py'}:length"], "num_generations": 4} if task == "grpo" else {},
        rollout={"max_completion_length": 8, "temperature": 1.0} if task == "grpo" else {},
        training={"train_iters": 1},
        batch={"micro_batch_size": 1, "global_batch_size": 8},
        checkpoint={"no_save_optim": True, "save_safetensors": False},
        evaluation={"eval_iters": 0, "eval_on_start": False},
        resources={"tasks_per_node": world},
    )
    return replace(found, task="rlhf", model=Model(model=str(folder / "policy"), torch_dtype="float32"), moe=MoE())


def _path(folder: Path, key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [str(folder / one) for one in value]
    return str(folder / value) if key in ("ref_model", "ref_load", "ref_adapter_load") else value


Said = list[tuple[list[int], list[float], float]]
"""Of each sequence: tokens, the weight of each token's prediction, and the reference's log-probability."""


def referred(run_dir: str) -> Said:
    """What the reference says of the first step's answers on this rank."""
    from megabatch.trainer import assemble
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.signals import StopSignal

    run = RunConfig.load(Path(run_dir) / "run.json")
    found = []
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        step = next(iter(loop.parts.steps.after(progress.cursor, loop.engine)))
        for pack in loop.parts.objective.prepare(step.packs, loop.engine):
            for n, start in enumerate(pack.cu_seqlens_padded.tolist()[: pack.sequences]):
                part = slice(start, start + int(pack.cu_seqlens.diff()[n]))
                reference = float(pack.columns["reference"][n])
                found.append((pack.ids_T[part].tolist(), pack.weights_T[part].tolist(), reference))
    return found


def in_the_ledger(run: Path) -> Said:
    """What the reference said of the first step's completions."""
    found = []
    for record in Reader(RunDirectory(run).ledger).records(1):
        ids = [*record.prompt_ids, *record.ids]
        weights = [0.0] * (len(record.prompt_ids) - 1) + [1.0] * len(record.ids) + [0.0]
        found.append((ids, weights, float(np.sum(record.columns["reference"]))))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_reference_is_the_named_model(name: str, ranks: RankServer, folder: Path) -> None:
    task, world, whose, _ = RUNS[name]
    run = write_run(made(folder, name), folder / "runs" / name.replace(" ", "_"))
    if task == "grpo":
        assert ranks.run(train, world_size=world, run_dir=str(run)) == [0] * world
        said = in_the_ledger(run)
    else:
        said = [one for some in ranks.run(referred, world_size=world, run_dir=str(run)) for one in some]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / whose, dtype=torch.float64)
    assert len(said) >= 8
    for ids, weights, reference in said:
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
        expected = float((logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] * torch.tensor(weights[:-1])).sum())
        assert reference == pytest.approx(expected, rel=1e-5)


def test_a_damaged_adapter_is_no_reference(ranks: RankServer, folder: Path, tmp_path: Path) -> None:
    name = "kto lora ref_adapter_load"
    damaged = shutil.copytree(folder / "adapter_mcore", tmp_path / "damaged")
    manifest = read_manifest(damaged)
    assert manifest is not None
    parts = {(inner, part.name): part for inner, file in manifest.files.items() for part in file.ranges}
    inner, part = next((inner, part) for (inner, name), part in parts.items() if "linear_proj.lora_A" in name)
    data = bytearray((damaged / inner).read_bytes())
    data[part.offset + part.size // 2] ^= 1
    (damaged / inner).write_bytes(data)
    run = write_run(with_fields(made(folder, name), rlhf={"ref_adapter_load": str(damaged)}), tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"is damaged\n .* differs from its digest"):
        ranks.run(referred, world_size=2, run_dir=str(run))


def test_stored_log_probabilities_are_of_one_adapter_and_one_model(folder: Path, tmp_path: Path) -> None:
    """The name of a run stands for its newest checkpoint."""
    steps = [tmp_path / "run" / "checkpoints" / f"step_{n:08d}" for n in (1, 2)]
    for n, step in enumerate(steps):
        (step / "mcore").mkdir(parents=True)
        (step / "mcore" / ".metadata").touch()
        (step / "trainer.json").write_text("{}")
        (step / MANIFEST).write_text(str(n))

    def key(groups: dict[str, dict[str, Any]]) -> str:
        run = write_run(with_fields(made(folder, "kto ref_adapters"), **groups), tmp_path / "key")
        return reference_key(RunConfig.load(run / "run.json"), "", digests=Digests(tmp_path))

    def of_adapter(path: Path) -> str:
        return key({"bridge": {"ref_adapters": [str(path)]}})

    assert of_adapter(tmp_path / "run") == of_adapter(steps[1]) != of_adapter(steps[0])
    scaled = {"training": {"megatron_extra_kwargs": {"moe_router_force_load_balancing": True}}}
    assert key({}) == key({}) != key(scaled)
