"""Models with a head, trained in bf16: what transformers reads in the exported folder, in bf16 and in fp32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from compositions import Composition
from rank_server import RankServer
from runs import with_fields, write_run
from safetensors.torch import load_file
from scored import recipe_of, write_rows

from megabatch import Model, Recipe, Rlhf

ALONE = Composition(experts=False, packed=False, lora=False)
TASKS = ("seq_cls", "reranker", "embedding", "rm")


def read(run_dirs: list[str]) -> list[list[tuple[list[int], list[float]]]]:
    """(token ids, scores or vector) of each sequence of the first global batch of every run. A run in bf16 takes its
    step before, and exports what it then has."""
    import torch.distributed as dist
    from adapted import opened
    from headed import sequences

    dist.init_process_group("gloo")
    found = []
    for run_dir in run_dirs:
        with opened(run_dir, trained=False) as (run, loop, progress):
            packs = next(loop.parts.steps.after(progress.cursor, loop.engine)).packs
            if run.recipe.precision.bf16:
                with loop.metrics:
                    next(loop.steps(progress))
                (folder := Path(run_dir) / "exported").mkdir()
                loop.parts.export.save(loop.engine.model, loop.engine.ranks, folder)
            readout = loop.parts.objective.readout
            (name,) = readout.fields
            told = [values for fields in loop.engine.infer(packs, readout) for values in fields[name].tolist()]
            rows = [ids.tolist() for pack in packs for ids, _ in sequences(pack)]
            found.append(list(zip(rows, told, strict=True)))
    dist.destroy_process_group()
    return found


def made(task: str, folder: Path) -> Recipe:
    if task != "rm":
        write_rows(task, folder)
        return recipe_of(task)(ALONE, folder)
    rows = [{"query": f"{n} + 7?", "response": str(n + 7), "rejected_response": f"{n}"} for n in range(24)]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = with_fields(recipe_of("seq_cls")(ALONE, folder), training={"task_type": "causal_lm", "num_labels": None})
    return replace(plain, task="rlhf", rlhf=Rlhf(rlhf_type="rm"))


@torch.no_grad()
def of_transformers(task: str, folder: Path, dtype: torch.dtype, texts: list[list[int]]) -> torch.Tensor:
    kind = transformers.AutoModel if task == "embedding" else transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    assert {one.dtype for one in model.parameters()} == {dtype}
    told = [model(input_ids=torch.tensor([ids])) for ids in texts]
    return torch.stack(
        [(one.last_hidden_state[0, -1] if task == "embedding" else one.logits[0]).float() for one in told]
    )


def test_scores_of_a_bf16_folder(ranks: RankServer, tmp_path: Path) -> None:
    """In fp32 a folder's weights give one number; the trainer in bf16 is as near to it as transformers in bf16."""
    runs = {}
    for task in TASKS:
        (folder := tmp_path / task).mkdir()
        runs[task] = made(task, folder)
        if task in ("reranker", "rm"):  # rows that hold each text whole
            runs[task] = with_fields(runs[task], rlhf={"share_prompts": False})
        write_run(with_fields(runs[task], model={"torch_dtype": "bfloat16"}), folder / "bf16")
    (first,) = ranks.run(read, world_size=1, run_dirs=[str(tmp_path / task / "bf16") for task in TASKS])
    for task in TASKS:
        whole = Model(model=str(tmp_path / task / "bf16" / "exported"), torch_dtype="float32")
        write_run(replace(runs[task], model=whole), tmp_path / task / "fp32")
    (second,) = ranks.run(read, world_size=1, run_dirs=[str(tmp_path / task / "fp32") for task in TASKS])
    for task, trained, loaded in zip(TASKS, first, second, strict=True):
        folder = tmp_path / task / "bf16" / "exported"
        config = json.loads((folder / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        texts = [ids for ids, _ in trained]
        assert texts == [ids for ids, _ in loaded]
        half, single = (torch.tensor([values for _, values in some]) for some in (trained, loaded))
        exact = of_transformers(task, folder, torch.float32, texts)
        theirs = of_transformers(task, folder, torch.bfloat16, texts)
        scale = exact.abs().max()
        assert (single - exact).abs().max() <= 1e-5 * scale, task
        assert (half - exact).abs().max() <= 3 * (theirs - exact).abs().max() <= 0.05 * scale, task
