"""Distillation on the trainer: a teacher of another shape, top tokens, answers that models write. Every layout's
numbers are in `aligned`."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from rank_server import RankServer
from runs import SHAPE, curve, metrics, recipe, train, write_dataset, write_run

from megabatch import Recipe
from megabatch.config.run import RunConfig
from megabatch.data.tokens.tokenizer import train_bpe
from megabatch.errors import MegabatchError
from megabatch.ledger.reader import Reader
from megabatch.run_directory import RunDirectory

GROUPS: dict[str, dict[str, Any]] = {
    "rlhf": {"rlhf_type": "gkd"},
    "gkd": {"sft_alpha": 0.1, "lmbda": 0.0, "beta": 0.3},
    "learning_rate": {"lr": 0.003, "min_lr": 0.003},
    "optimizer": {"adam_eps": 1e-3, "weight_decay": 0.0},
    "training": {"train_iters": 3},
    "batch": {"global_batch_size": 4},
    "evaluation": {"eval_interval": 3},
}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VPP = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
TOP = {"gkd": {"gkd_logits_topk": 7}}
PACKED = {"data": {"packing": True, "packing_length": 160, "max_length": 128}}
WRITTEN = {
    "gkd": {"lmbda": 0.6, "seq_kd": True},
    "rollout": {"max_completion_length": 12, "temperature": 0.8},
    "training": {"train_iters": 4, "seed": 3},
}
TWO = {"gkd": {"teacher_model": "of two files", "lmbda": 0.5}, "data": {"dataset": ["train.jsonl", "others.jsonl"],
       "val_dataset": ["validation.jsonl"]}, "rollout": {"max_completion_length": 12}}  # fmt: skip
"""The rows of each training file have their own teacher."""


def teacher(**sizes: int) -> dict[str, int]:
    """A layout of the teacher's own."""
    return {f"teacher_{name}_{'model_' if name != 'context' else ''}parallel_size": n for name, n in sizes.items()}


LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "pp2_vpp2": {"parallel": VPP},
    "dp2_teacher_tp2": {"gkd": teacher(tensor=2)},
    "top_tp2_sp_teacher_pp2": {"parallel": TP, "gkd": {**TOP["gkd"], **teacher(tensor=1, pipeline=2)}},
    "experts_ep2_teacher_cp2": {"parallel": {"expert_model_parallel_size": 2}, **PACKED, "gkd": teacher(context=2)},
    "two_tp2_sp_teacher_pp2": {
        "parallel": TP, **TWO, "gkd": {**TWO["gkd"], **teacher(tensor=1, pipeline=2)},
    },
    "written_tp2_sp_teacher_dp2": {"parallel": TP, **WRITTEN, "gkd": {**WRITTEN["gkd"], **teacher(tensor=1)}},
}  # fmt: skip


COMPARED = ("loss", "divergence", "nll_loss", "grad_norm", "on_policy", "completion_length")


def write_teacher(folder: Path, *, vocab_size: int = SHAPE["padded_vocab_size"], hidden_size: int = 48) -> Path:
    torch.manual_seed(hidden_size)
    config = transformers.Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return write_model(transformers.Qwen3ForCausalLM(config), folder)


def write_teacher_with_experts(folder: Path) -> Path:
    torch.manual_seed(9)
    config = transformers.Qwen3MoeConfig(
        vocab_size=SHAPE["padded_vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return write_model(transformers.Qwen3MoeForCausalLM(config), folder)


def write_model(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder)
    return folder


def of_two_files(folder: Path) -> str:
    """Teachers of unequal width, the second with the validation rows."""
    tagged = {"teacher": ["train.jsonl"], "narrow": ["others.jsonl", "validation.jsonl"]}
    return json.dumps([{"model": str(folder / name), "tags": tags} for name, tags in tagged.items()])


def made(folder: Path, world_size: int, groups: dict[str, dict[str, Any]]) -> Recipe:
    every = {name: {**GROUPS.get(name, {}), **groups.get(name, {})} for name in {*GROUPS, *groups}}
    every["gkd"] = {"teacher_model": str(folder / "teacher"), **every["gkd"]}
    if every["gkd"]["teacher_model"] == TWO["gkd"]["teacher_model"]:
        every["gkd"]["teacher_model"] = of_two_files(folder)
        every["data"] = {name: [str(folder / file) for file in files] for name, files in every["data"].items()}
    model = "qwen3_moe" if "packing" in every.get("data", {}) else "qwen2"
    return replace(recipe(folder, model, **every, resources={"tasks_per_node": world_size}), task="rlhf")


def trained(ranks: RankServer, folder: Path, name: str, world: int, groups: dict[str, Any]) -> Path:
    run = write_run(made(folder, world, groups), folder / name)
    assert set(ranks.run(train, world_size=world, run_dir=str(run))) == {0}
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gkd")
    write_teacher(folder / "teacher")
    write_teacher(folder / "narrow", hidden_size=40)
    write_dataset(folder / "others.jsonl", samples=40, seed=2)
    return folder


class References:
    """Runs of one process, by what is special of them; each is trained when it is first asked for."""

    SPECIAL: ClassVar[dict[str, dict[str, Any]]] = {
        "top": TOP,
        "experts": PACKED,
        "written": WRITTEN,
        "two": TWO,
    }

    def __init__(self, ranks: RankServer, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._made: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            self._made[name] = trained(self._ranks, self._folder, name, 1, self.SPECIAL.get(name, {}))
        return self._made[name]

    def of(self, layout: str) -> Path:
        return self[next((name for name in self.SPECIAL if name in layout), "full")]


@pytest.fixture(scope="module")
def references(ranks: RankServer, folder: Path) -> References:
    return References(ranks, folder)


def test_a_student_comes_nearer_to_its_teacher(references: References) -> None:
    start, end = metrics(references["full"], "eval")
    assert 0 < end["eval_divergence"] < start["eval_divergence"]
    assert start["eval_loss"] == pytest.approx(start["eval_divergence"] + 0.1 * start["eval_nll_loss"], rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_number(layout: str, ranks: RankServer, folder: Path, references: References) -> None:
    run = trained(ranks, folder, layout, 2, LAYOUTS[layout])
    reference = references.of(layout)
    for kind in ("train", "eval"):
        for found, expected in zip(metrics(run, kind), metrics(reference, kind), strict=True):
            for name in expected:
                if name.removeprefix("eval_") in COMPARED and expected[name] is not None:
                    near = pytest.approx(expected[name], rel=2e-5, abs=2e-6)
                    assert found[name] == near, (kind, found["step"], name)


def top_tokens(run_dir: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of the first step on one rank: each pack's ids and ends of sequences, the teacher's top tokens and logits."""
    from megabatch.trainer import assemble
    from megabatch.trainer.activity import Activity
    from megabatch.trainer.loop import open_loop
    from megabatch.trainer.readouts.top_tokens import IDS, LOGITS
    from megabatch.trainer.signals import StopSignal

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        step = next(iter(loop.parts.steps.after(progress.cursor, loop.engine)))
        packs = loop.parts.objective.prepare(step.packs, loop.engine)
        return [(one.ids_T, one.cu_seqlens_padded, one.token_columns[IDS], one.token_columns[LOGITS]) for one in packs]


@pytest.mark.parametrize(
    ("student", "moe"), [("qwen2", {}), ("qwen3_moe", {"moe_expert_capacity_factor": 0.5})], ids=["dense", "experts"]
)
def test_a_teacher_with_experts(student: str, moe: dict[str, Any], ranks: RankServer, folder: Path) -> None:
    """Its logits are those of transformers, whatever experts and further settings the student has: none of its tokens
    is dropped, or routed otherwise."""
    model = write_teacher_with_experts(folder / "experts of a teacher")
    groups: dict[str, Any] = {**GROUPS, "gkd": {"teacher_model": str(model), "lmbda": 0.0, **TOP["gkd"]}, "moe": moe}
    groups["training"] = {"megatron_extra_kwargs": {"moe_router_force_load_balancing": True}}
    made = replace(recipe(folder, student, **groups), task="rlhf")
    run = write_run(made, folder / f"taught by experts, {student}")
    (packs,) = ranks.run(top_tokens, world_size=1, run_dir=str(run))
    teacher = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, experts_implementation="eager"
    )
    assert packs
    for ids_T, ends, top_TK, logits_TK in packs:
        for start, end in pairwise(ends.tolist()):
            with torch.no_grad():
                expected_TV = teacher(ids_T[None, start:end]).logits[0]
            picked_TK = expected_TV.gather(1, top_TK[start:end].long())
            torch.testing.assert_close(logits_TK[start:end].double(), picked_TK, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(picked_TK, expected_TV.topk(7).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["written", "two"])
def test_a_run_that_was_stopped_goes_on_exactly(
    name: str, ranks: RankServer, folder: Path, references: References
) -> None:
    """With answers that models write, and with a teacher for each file."""
    run = write_run(made(folder, 1, References.SPECIAL[name]), folder / f"{name}, cut")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=2) == [75]
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    assert curve(run) == curve(references[name])


def test_answers_are_the_models_own(folder: Path, references: References) -> None:
    """Each step has answers of one model, with the log-probabilities that transformers gives them."""
    run, models = references["written"], {"teacher": folder / "teacher"}
    reader = Reader(RunDirectory(run).ledger)
    wrote = {step: {record.extra["writer"] for record in reader.records(step)} for step in reader.steps}
    assert list(wrote) == [1, 2, 3, 4] and all(len(some) == 1 for some in wrote.values())
    assert {name for some in wrote.values() for name in some} == {"student", "teacher"}
    for step, line in enumerate(metrics(run), start=1):
        assert line["on_policy"] == float(wrote[step] == {"student"})
        records = list(reader.records(step))
        assert line["completion_length"] == sum(len(one.ids) for one in records) / 4 <= 12
        if wrote[step] != {"teacher"}:
            continue
        teacher = transformers.AutoModelForCausalLM.from_pretrained(models["teacher"])
        for one in records:
            ids = torch.tensor([[*one.prompt_ids, *one.ids]])
            with torch.no_grad():
                logits = teacher(ids).logits[0, len(one.prompt_ids) - 1 : -1]
            expected = (logits / 0.8).log_softmax(1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.logps), expected, rtol=1e-4, atol=1e-4)


def test_the_exported_model_is_the_students(references: References) -> None:
    """And so is the config.json beside its tokenizer, which a teacher's once replaced."""
    run = references["written"]
    for folder in (run / "model", *(run / "checkpoints").glob("step_*/hf")):
        config = transformers.AutoConfig.from_pretrained(folder)
        assert (config.model_type, config.hidden_size) == ("qwen2", SHAPE["hidden_size"])


def test_the_students_answers_are_not_imitated(references: References) -> None:
    for line in metrics(references["written"]):
        if line["on_policy"]:
            assert line["nll_loss"] is None and line["loss"] == pytest.approx(line["divergence"], rel=1e-6)
        else:
            assert line["loss"] == pytest.approx(line["divergence"] + 0.1 * line["nll_loss"], rel=1e-6)


def faults(run_dirs: list[str]) -> list[str]:
    """Why each run ends."""
    found = []
    for run_dir in run_dirs:
        with pytest.raises(MegabatchError) as error:
            train(run_dir)
        found.append(str(error.value))
    return found


def test_a_teacher_with_other_tokens_is_refused(ranks: RankServer, folder: Path) -> None:
    """The last one has those of the tokenizer, and so of the data; the student, of 304, writes others."""
    tokenizer = train_bpe(["It is 12 34 56, what is + so many tokens?"], vocab_size=300, out_dir=folder / "ids")
    known = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    wanted = {
        2000: "has 2,000 tokens and the student 304: distillation compares tokens by their ids",
        known - 1: f"and the student's tokenizer {known}: a teacher without all of them cannot read what",
        known: f"the teacher has {known} tokens and cannot read a text with the token of id ",
    }
    runs = []
    for tokens in wanted:
        teacher = write_teacher(folder / f"of {tokens}", vocab_size=tokens)
        groups: dict[str, dict[str, Any]] = {
            "gkd": {**GROUPS["gkd"], "teacher_model": str(teacher), "lmbda": 1.0},
            "rollout": {"max_completion_length": 100, "temperature": 1.0},
            "evaluation": {"eval_iters": 0, "eval_on_start": False},
        }
        student = made(folder, 1, groups)
        student = replace(student, model=replace(student.model, tokenizer=str(tokenizer)))
        runs.append(str(write_run(student, folder / f"of {tokens}, run")))
    (found,) = ranks.run(faults, world_size=1, run_dirs=runs)
    for fault, expected in zip(found, wanted.values(), strict=True):
        assert expected in fault
