"""Preferences, reward models and distillation as compositions of parallel sizes, rows and tuning, from one model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from compositions import GLOBAL_BATCH_SIZE, Composition, laid_out, layout_of
from runs import recipe_on, with_fields

from megabatch import Model, Recipe
from megabatch.data.tokens.tokenizer import train_bpe

OBJECTIVES: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {"dpo": {"beta": 0.3, "loss_type": ("sigmoid", "ipo", "aot"), "rpo_alpha": 0.3}},
    "kto": {"kto": {"beta": 0.1, "undesirable_weight": 1.3}},
    "rm": {"rm": {"center_rewards_coefficient": 0.1}},
    "prm": {},
    "gkd": {"gkd": {"lmbda": 0.0, "beta": 0.3, "sft_alpha": 0.1}, "rollout": {"temperature": 0.8}},
}
COMPARED = ("dpo", "kto")
"""Objectives with a reference."""
LABELS = {"rm": 1, "prm": 2}
"""Scores of each sequence, or of each token, of objectives whose models have a head."""
LR, EPSILON = 1e9, 1e6
"""Of Adam, whose first step is lr · g / (|g| + epsilon): large beside a weight, whose rounding hides no gradient."""
RANK = 4
MOST_SIZES = 3
"""Parallel sizes above 1 at once."""
VOCAB = 301  # which tensor parallelism pads
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                           "norm_topk_prob": True}  # fmt: skip
ATTENTION, LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, order=True)
class Aligned(Composition):
    """One way to train towards one objective."""

    objective: str
    accumulated: bool
    """Whether each rank adds up micro-batches of one row; else it has one (each stage of a pipeline one)."""

    @property
    def micro_batch_size(self) -> int:
        return 1 if self.accumulated else GLOBAL_BATCH_SIZE // self.dp // self.pp

    @property
    def name(self) -> str:
        return f"{self.objective}-{super().name}{'-accumulated' if self.accumulated else ''}"

    @property
    def kind(self) -> Kind:
        return Kind(self.objective, self.experts, self.packed, self.lora)


@dataclass(frozen=True)
class Kind:
    """What decides the numbers: all but the layout."""

    objective: str
    experts: bool
    packed: bool
    lora: bool

    @property
    def base(self) -> str:
        head = f"-{self.objective}" if self.objective in LABELS else ""
        return f"{'experts' if self.experts else 'dense'}{head}"

    @property
    def alone(self) -> Aligned:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Aligned(**own, accumulated=False)

    def start(self, folder: Path) -> Path:
        """What a run begins with and trains: a model, or an adapter of it."""
        return folder / (f"{self.base}-adapter" if self.lora else self.base)

    def teachers(self, folder: Path) -> list[Path]:
        """One, or where rows are packed two of unequal width, each for some of the rows."""
        return [folder / "teacher", *([folder / "wide teacher"] if self.packed else [])]

    def reference(self, folder: Path) -> Path:
        return folder / (self.base if self.lora else f"{self.base}-reference")


@cache
def every() -> tuple[Aligned, ...]:
    """All of sizes 1 and 2, with sequence and virtual pipeline parallelism wherever they can be; with experts where a
    layout splits them, or nothing. In order of size."""
    return tuple(sorted(_candidates(), key=lambda one: (one.world_size, one)))


def _candidates() -> Iterator[Aligned]:
    for experts, tp, pp, cp, dp, ep, etp in product((False, True), *[(1, 2)] * 6):
        sizes = (tp, pp, cp, dp, ep, etp)
        if sizes.count(2) > MOST_SIZES or max(ep, etp) > (2 if experts else 1):
            continue
        if experts and ep == etp == 1 < max(sizes):
            continue
        for objective, packed, lora, accumulated in product(OBJECTIVES, *[(False, True)] * 3):
            one = Aligned(
                objective=objective, experts=experts, packed=packed, lora=lora, accumulated=accumulated,
                tp=tp, sp=tp > 1, pp=pp, vp=pp, cp=cp, dp=dp, ep=ep, etp=etp,
            )  # fmt: skip
            if layout_of(one) is not None:
                yield one


def recipe_of(one: Aligned, folder: Path) -> Recipe:
    """A run of one step on what `make` made in `folder`."""
    kind, rows = one.kind, folder / f"{one.objective}.jsonl"
    own = dict(OBJECTIVES[one.objective])
    if one.objective == "gkd":
        own["gkd"] = {**own["gkd"], **_teachers(kind, folder), **_teachers_layout(one)}
    bridge: dict[str, Any] = {"ref_model": str(kind.reference(folder))} if one.objective in COMPARED else {}
    if one.lora:
        bridge = {"merge_lora": False, "adapters": [str(kind.start(folder))]}
        targets = ATTENTION if one.experts else (*ATTENTION, *LINEAR)
        own["tuner"] = {"tuner_type": "lora", "lora_rank": RANK, "lora_alpha": 8, "lora_dropout": 0.0,
                        "target_modules": list(targets)}  # fmt: skip
    packed = {"packing": True, "packing_length": 128} if one.packed else {}
    made = recipe_on(
        folder,
        "qwen3_moe" if one.experts else "qwen3",
        data={"dataset": [str(rows)], "val_dataset": [], "max_length": 64, **packed},
        rlhf={"rlhf_type": one.objective},
        batch={"global_batch_size": GLOBAL_BATCH_SIZE},
        training={"train_iters": 1},
        optimizer={"adam_eps": EPSILON, "weight_decay": 0.0, "clip_grad": 0.0},
        learning_rate={"lr": LR, "min_lr": LR},
        evaluation={"eval_on_start": False, "eval_interval": None},
        bridge=bridge,
        **own,
    )
    made = replace(made, task="rlhf", model=Model(model=str(folder / kind.base), torch_dtype="float32"))
    if one.experts:
        made = with_fields(made, moe={"num_experts": None, "moe_ffn_hidden_size": None, "moe_router_topk": None})
    return laid_out(made, one)


def _teachers(kind: Kind, folder: Path) -> dict[str, str]:
    models = kind.teachers(folder)
    if len(models) == 1:
        return {"teacher_model": str(models[0])}
    tagged = [{"model": str(model), "tags": [str(number)]} for number, model in enumerate(models)]
    return {"teacher_model": json.dumps(tagged), "teacher_tag_key": "taught_by"}


def _teachers_layout(one: Aligned) -> dict[str, int]:
    """One of its own where micro-batches are added up: matrices whole where the student's are split, or split."""
    if one.accumulated and one.tp * one.dp > 1:
        return {"teacher_tensor_model_parallel_size": 1 if one.tp > 1 else 2}
    return {}


def make(folder: Path) -> None:
    """Rows, models, adapters and teachers, all of random numbers."""
    transformers.utils.logging.disable_progress_bar()
    _write_rows(folder)
    for experts, objective in product((False, True), ("dpo", *LABELS)):
        base = Kind(objective, experts, packed=False, lora=False).base
        _save(folder / base, objective, experts=experts, seed=7)
        _save_adapter(folder, base, objective, experts=experts)
        if objective == "dpo":
            _save(folder / f"{base}-reference", objective, experts=experts, seed=8, initializer_range=0.25)
    _save(folder / "teacher", "gkd", seed=9, hidden_size=48, head_dim=12)
    _save(folder / "wide teacher", "gkd", seed=10, hidden_size=64, tie_word_embeddings=True)


def _save(folder: Path, objective: str, *, seed: int, experts: bool = False, **changed: Any) -> None:
    shape = {**COMMON, **(EXPERTS if experts else {}), **changed}
    labels = {"num_labels": LABELS[objective]} if objective in LABELS else {}
    config = transformers.AutoConfig.for_model("qwen3_moe" if experts else "qwen3", **shape, **labels)
    torch.manual_seed(seed)
    class_of(objective).from_config(config).save_pretrained(folder)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder)


def _save_adapter(folder: Path, base: str, objective: str, *, experts: bool) -> None:
    """As peft makes it, with numbers in both matrices."""
    model = class_of(objective).from_pretrained(folder / base)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=8,
        target_modules=list(ATTENTION if experts else (*ATTENTION, *LINEAR)),
        init_lora_weights=False,
        task_type={"rm": "SEQ_CLS", "prm": "TOKEN_CLS"}.get(objective, "CAUSAL_LM"),
    )
    torch.manual_seed(11)
    peft.get_peft_model(model, config).save_pretrained(folder / f"{base}-adapter")


def class_of(objective: str) -> Any:
    """transformers' class of the models of an objective."""
    if objective == "rm":
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForTokenClassification if objective == "prm" else transformers.AutoModelForCausalLM


def _write_rows(folder: Path) -> None:
    """Sums: pairs with margins, labelled answers, conversations, steps of answers."""
    draw, further = random.Random(0), random.Random(1)
    rows: dict[str, list[dict[str, Any]]] = {objective: [] for objective in OBJECTIVES}
    for _ in range(160):
        a, b = draw.randint(0, 99), draw.randint(0, 99)
        asked, right = {"query": f"{a} + {b}?"}, {"response": str(a + b)}
        wrong = f"{a - b}" + " or so" * draw.randint(0, 2)
        pair = {**asked, **right, "rejected_response": wrong}
        rows["dpo"].append(pair)
        rows["rm"].append({**pair, "margin": round(draw.random(), 2)})
        good = draw.random() < 0.6
        rows["kto"].append({**asked, "response": right["response"] if good else wrong, "label": good})
        rows["gkd"].append({**asked, **right, "taught_by": further.randint(0, 1)})
        steps = [f"{a} and", *(["so"] * further.randint(0, 2)), f"{b}"]
        judged = [further.random() < 0.6 for _ in steps]
        rows["prm"].append({"prompt": f"{a} + {b}?", "completions": steps, "labels": judged})
    for objective, some in rows.items():
        (folder / f"{objective}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
