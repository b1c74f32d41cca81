"""Experts that are one layer, as Transformer Engine's are, on any device: megatron-core's module for them over plain
linear layers that have the names and the interface of Transformer Engine's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Grouped(nn.Module):
    def __init__(self, num_gemms: int, rows: int, cols: int, config: Any) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.empty(rows, cols, dtype=config.params_dtype)))

    def forward(self, x_TI: Tensor, rows: list[int]) -> tuple[Tensor, None]:
        parts = [x @ getattr(self, f"weight{i}").t() for i, x in enumerate(x_TI.split(rows))]
        return torch.cat(parts), None


class TEColumnParallelGroupedLinear(_Grouped):
    def __init__(self, num_gemms: int, cols: int, rows: int, *, config: Any, pg_collection: Any, **_: Any) -> None:
        super().__init__(num_gemms, rows // pg_collection.expt_tp.size(), cols, config)


class TERowParallelGroupedLinear(_Grouped):
    def __init__(self, num_gemms: int, cols: int, rows: int, *, config: Any, pg_collection: Any, **_: Any) -> None:
        super().__init__(num_gemms, rows, cols // pg_collection.expt_tp.size(), config)


def train_grouped(run_dir: str) -> int:
    """`runs.train` of a model whose experts are one layer on each rank."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from runs import train

    from megabatch.trainer.model import layers

    plain: Any = layers.get_gpt_layer_local_spec

    def grouped(*args: Any, **kwargs: Any) -> Any:
        spec = plain(*args, **kwargs)
        if kwargs["num_experts"] is not None:
            linear = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
            spec.submodules.mlp.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=linear)
        return spec

    layers.get_gpt_layer_local_spec = grouped
    return train(run_dir)
