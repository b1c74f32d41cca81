"""Train and align large language models with megatron-core on Slurm: the names that a recipe needs.

They are imported when they are used, so that commands which need none of them start at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabatch.chain.declare import Chain, Command, Convert, Step, ended, notok, ok, output, singleton
    from megabatch.config.checkpoint import Bridge, Checkpoint
    from megabatch.config.data import Data
    from megabatch.config.embedding import Embedding
    from megabatch.config.export import Export
    from megabatch.config.grpo import Grpo, Rollout
    from megabatch.config.kernels import Kernels
    from megabatch.config.model import Model
    from megabatch.config.moe import MLA, MTP, MoE
    from megabatch.config.monitoring import Evaluation, Logging
    from megabatch.config.optimization import FP8, LearningRate, Optimizer, Precision
    from megabatch.config.parallel import Parallel
    from megabatch.config.recipe import Recipe
    from megabatch.config.recompute import Recompute
    from megabatch.config.reranker import Reranker
    from megabatch.config.resources import Resources
    from megabatch.config.rewards import Rewards
    from megabatch.config.rlhf import Dpo, Gkd, Kto, Prm, Rlhf, Rm
    from megabatch.config.roles import Role
    from megabatch.config.training import Batch, Training
    from megabatch.config.tuner import Tuner
    from megabatch.config.watching import Watching
    from megabatch.converters.request import ConversionRequest
    from megabatch.sweep.declare import Sweep

__all__ = [
    "FP8",
    "MLA",
    "MTP",
    "Batch",
    "Bridge",
    "Chain",
    "Checkpoint",
    "Command",
    "ConversionRequest",
    "Convert",
    "Data",
    "Dpo",
    "Embedding",
    "Evaluation",
    "Export",
    "Gkd",
    "Grpo",
    "Kernels",
    "Kto",
    "LearningRate",
    "Logging",
    "MoE",
    "Model",
    "Optimizer",
    "Parallel",
    "Precision",
    "Prm",
    "Recipe",
    "Recompute",
    "Reranker",
    "Resources",
    "Rewards",
    "Rlhf",
    "Rm",
    "Role",
    "Rollout",
    "Step",
    "Sweep",
    "Training",
    "Tuner",
    "Watching",
    "ended",
    "main",
    "notok",
    "ok",
    "output",
    "singleton",
]


_NAMES_OF = {
    "chain.declare": "Chain Command Convert Step ended notok ok output singleton",
    "config.checkpoint": "Bridge Checkpoint",
    "config.data": "Data",
    "config.embedding": "Embedding",
    "config.export": "Export",
    "config.grpo": "Grpo Rollout",
    "config.kernels": "Kernels",
    "config.model": "Model",
    "config.moe": "MLA MTP MoE",
    "config.monitoring": "Evaluation Logging",
    "config.optimization": "FP8 LearningRate Optimizer Precision",
    "config.parallel": "Parallel",
    "config.recipe": "Recipe",
    "config.recompute": "Recompute",
    "config.reranker": "Reranker",
    "config.resources": "Resources",
    "config.rewards": "Rewards",
    "config.rlhf": "Dpo Gkd Kto Prm Rlhf Rm",
    "config.roles": "Role",
    "config.training": "Batch Training",
    "config.tuner": "Tuner",
    "config.watching": "Watching",
    "converters.request": "ConversionRequest",
    "sweep.declare": "Sweep",
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def main(recipe: Callable[[], Recipe | Chain] | Sweep, argv: Sequence[str] | None = None) -> None:
    """Runs the command line of a recipe, chain or sweep (`--submit`, `--local`, any parameter) and exits."""
    from megabatch.cli import recipe_command

    recipe_command.main(recipe, argv)
