"""A recipe: a name, a task, and groups of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Literal

from megabatch.config.checkpoint import Bridge, Checkpoint
from megabatch.config.data import Data
from megabatch.config.declare import freeze_lists
from megabatch.config.embedding import Embedding
from megabatch.config.export import Export
from megabatch.config.grpo import Grpo, Rollout
from megabatch.config.kernels import Kernels
from megabatch.config.model import Model
from megabatch.config.moe import MLA, MTP, MoE
from megabatch.config.monitoring import Evaluation, Logging
from megabatch.config.optimization import FP8, LearningRate, Optimizer, Precision
from megabatch.config.parallel import Parallel
from megabatch.config.recompute import Recompute
from megabatch.config.reranker import Reranker
from megabatch.config.resources import Resources
from megabatch.config.rewards import Rewards
from megabatch.config.rlhf import Dpo, Gkd, Kto, Prm, Rlhf, Rm
from megabatch.config.roles import Role
from megabatch.config.training import Batch, Training
from megabatch.config.tuner import Tuner
from megabatch.config.watching import Watching
from megabatch.tasks import Task, find_task
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run, as its author declares it; derive variants with `dataclasses.replace(recipe, parallel=…)`."""

    name: str
    """Name of the run: letters, digits, dot, dash and underscore."""
    task: Literal["pt", "sft", "rlhf"]
    """Pre-training on plain text, supervised fine-tuning on conversations, or learning from preferences."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    training: Training = field(default_factory=Training)
    parallel: Parallel = field(default_factory=Parallel)
    recompute: Recompute = field(default_factory=Recompute)
    kernels: Kernels = field(default_factory=Kernels)
    moe: MoE = field(default_factory=MoE)
    mla: MLA = field(default_factory=MLA)
    mtp: MTP = field(default_factory=MTP)
    learning_rate: LearningRate = field(default_factory=LearningRate)
    optimizer: Optimizer = field(default_factory=Optimizer)
    precision: Precision = field(default_factory=Precision)
    fp8: FP8 = field(default_factory=FP8)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    evaluation: Evaluation = field(default_factory=Evaluation)
    watching: Watching = field(default_factory=Watching)
    tuner: Tuner = field(default_factory=Tuner)
    bridge: Bridge = field(default_factory=Bridge)
    rlhf: Rlhf = field(default_factory=Rlhf)
    dpo: Dpo = field(default_factory=Dpo)
    kto: Kto = field(default_factory=Kto)
    rm: Rm = field(default_factory=Rm)
    prm: Prm = field(default_factory=Prm)
    embedding: Embedding = field(default_factory=Embedding)
    reranker: Reranker = field(default_factory=Reranker)
    grpo: Grpo = field(default_factory=Grpo)
    rewards: Rewards = field(default_factory=Rewards)
    gkd: Gkd = field(default_factory=Gkd)
    rollout: Rollout = field(default_factory=Rollout)
    export: Export = field(default_factory=Export)
    resources: Resources = field(default_factory=Resources)
    roles: Sequence[Role] = ()
    """Servers beside the ranks, on further nodes; only a recipe file can set them, not a flag."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    @property
    def kind(self) -> Task | None:
        """The row of the table of tasks; None if `task`, `rlhf_type` and `task_type` contradict each other."""
        return find_task(self.task, rlhf_type=self.rlhf.rlhf_type, task_type=self.training.task_type)
