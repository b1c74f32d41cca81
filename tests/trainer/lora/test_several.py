"""A frozen adapter beside the trained one, each in use in turn: log-probabilities as in peft with `set_adapter`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import beside, make_base, opened
from rank_server import RankServer
from runs import recipe, write_run

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.families import family_of
from megabatch.converters.hf_model import read_config
from megabatch.entry.tuning import tuning_faults

LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}
TRAINED: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
OTHER: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "rank_pattern": {r".*layers\.1\.self_attn\.[qv]_proj": 3},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}
NAMES = {"policy": "default", "reference": "other", "base": None, "apart": "other"}
"""Models of the run, and the adapter of peft's that each of them has."""


def made_adapter(base: Path, folder: Path, *, seed: int, **config: Any) -> Path:
    """An adapter by peft with normal numbers in both matrices."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two adapters of it; the second also in megatron-core's format."""
    folder = tmp_path_factory.mktemp("several")
    base = make_base(folder, "dense")
    made_adapter(base, folder / "trained", seed=1, **TRAINED)
    made_adapter(base, folder / "other", seed=2, **OTHER)
    request = ConversionRequest(to_mcore=True, adapters=[folder / "other"], model=base, merge_lora=False)
    convert(request, output_dir=folder / "other_mcore")
    return folder


def inferred(run_dir: str, other: str) -> tuple[dict[str, Any], list[Any]]:
    """Log-probabilities of the first batch under each model, before a step and the reference's after it; the rows."""
    from megabatch.trainer.assemble import frozen_model
    from megabatch.trainer.readouts.tokens import Tokens
    from megabatch.trainer.references import PolicyWith
    from megabatch.trainer.tasks import sft, table

    def parts(run: Any, source: Any, ranks: Any, **keywords: Any) -> Any:
        apart = frozen_model(run, ranks, source, adapter=Path(other))
        frozen = {"reference": PolicyWith(Path(other)), "base": PolicyWith(), "apart": apart}
        return replace(sft.parts(run, source, ranks, **keywords), frozen=frozen)

    table.OPENERS["sft"] = parts  # type: ignore[index]
    with opened(run_dir, trained=False) as (_, loop, progress):
        engine = loop.engine
        step = next(loop.parts.steps.after(progress.cursor, engine))

        def logps(model: str) -> list[Any]:
            return [one["logps"].numpy() for one in engine.infer(step.packs, Tokens(), model=model)]

        found = {name: logps(name) for name in NAMES}
        engine.step(step.packs, loop.parts.objective, totals=step.totals, filled=step.filled)
        found |= {f"{name} after": logps(name) for name in NAMES}
        rows = [(p.ids_T, p.targets_T, p.cu_seqlens_padded[: p.sequences + 1]) for p in step.packs]
        return found, [[x.numpy() for x in row] for row in rows]


def expected(folder: Path, rows: list[Any]) -> dict[str, list[torch.Tensor]]:
    """The same in peft, with one adapter active at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, folder / "trained").eval()
    adapted.load_adapter(folder / "other", "other")
    found: dict[str, list[torch.Tensor]] = {}
    for name, adapter in NAMES.items():
        adapted.set_adapter(adapter or "default")
        if adapter is None:
            adapted.base_model.disable_adapter_layers()
        found[name] = [_logps(adapted, *row) for row in rows]
        adapted.base_model.enable_adapter_layers()
    return found


def _logps(model: Any, ids: Any, targets: Any, starts: Any) -> torch.Tensor:
    parts = []
    with torch.no_grad():
        for start, stop in pairwise(starts):
            logits = model(torch.from_numpy(ids[start:stop])[None]).logits[0]
            wanted = torch.from_numpy(targets[start:stop, None])
            parts.append(logits.log_softmax(-1).gather(1, wanted)[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize(("layout", "other"), [("alone", "other"), ("tp2_sp", "other_mcore"), ("pp2", "other")])
def test_each_adapter_in_use_is_that_of_peft(
    layout: str, other: str, ranks: RankServer, folder: Path, tmp_path: Path
) -> None:
    world_size, parallel = LAYOUTS[layout]
    bridge = {"adapters": [str(folder / "trained")]}
    groups = {"bridge": bridge, "parallel": parallel, "resources": {"tasks_per_node": world_size}}
    run = write_run(beside(recipe(tmp_path, "qwen3", tuner=LORA, **groups), folder / "dense"), tmp_path / "run")
    results = ranks.run(inferred, world_size=world_size, run_dir=str(run), other=str(folder / other))
    _, rows = results[0]
    theirs = expected(folder, rows)
    for found, _ in results:
        for name in NAMES:
            for own, reference in zip(found[name], theirs[name], strict=True):
                assert torch.allclose(torch.from_numpy(own)[: len(reference)], reference, rtol=1e-5, atol=1e-4), name
        for name in ("reference", "base", "apart"):
            assert all((a == b).all() for a, b in zip(found[name], found[f"{name} after"], strict=True)), "frozen"
        assert any((a != b).any() for a, b in zip(found["policy"], found["policy after"], strict=True))
    first = [theirs[name][0] for name in ("policy", "reference", "base", "policy")]
    assert all((a - b).abs().max() > 1e-2 for a, b in pairwise(first)), "the adapters differ"


def test_an_adapter_that_cannot_be_a_reference_is_refused_before_the_queue(folder: Path, tmp_path: Path) -> None:
    base, config = folder / "dense", read_config(folder / "dense")
    shape = family_of(config).shape(config)
    cases: dict[str, dict[str, Any]] = {
        r"replaces lm_head.weight of the model": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        r"differs inside one layer of megatron-core's \(model.layers.0.self_attn.q_proj.weight: rank 2": {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"q_proj": 2},
        },
    }
    for number, (message, fields) in enumerate(cases.items()):
        adapter = made_adapter(base, tmp_path / str(number), seed=3, r=4, **fields)
        one = beside(recipe(tmp_path, "qwen3", bridge={"ref_adapters": [str(adapter)]}, tuner=LORA), base)
        (fault,) = tuning_faults(one, shape)
        assert fault.field == "bridge.ref_adapters:"
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(str(fault))
    (fault,) = tuning_faults(
        beside(recipe(tmp_path, "qwen3", bridge={"ref_adapters": [str(tmp_path / "none")]}, tuner=LORA), base), shape
    )
    assert "there is no folder" in str(fault)
