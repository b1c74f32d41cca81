"""The optimizer and its learning-rate schedule, both megatron-core's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megabatch.config.optimization import LearningRate
from megabatch.config.optimization import Optimizer as OptimizerGroup
from megabatch.errors import MegabatchError
from megabatch.trainer.model.build import Model


class Optimizer:
    """Adam (decoupled weight decay) or SGD over a model's chunks, with warmup, decay and clipping.

    As in Megatron-LM, parameters of one dimension (norms, biases) have no weight decay, and with warmup the first
    step's learning rate is 0.
    """

    def __init__(
        self,
        model: Model,
        *,
        group: OptimizerGroup,
        learning_rate: LearningRate,
        train_iters: int,
        use_distributed_optimizer: bool,
        overlap_param_gather: bool,
    ) -> None:
        config = OptimizerConfig(
            optimizer=group.optimizer,
            lr=learning_rate.lr,
            min_lr=learning_rate.min_lr,
            weight_decay=group.weight_decay,
            clip_grad=group.clip_grad,
            adam_beta1=group.adam_beta1,
            adam_beta2=group.adam_beta2,
            adam_eps=group.adam_eps,
            sgd_momentum=group.sgd_momentum,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_param_gather=overlap_param_gather,
        )
        self.clips = group.clip_grad > 0
        self.is_adam = group.optimizer == "adam"
        self.megatron: Any = get_megatron_optimizer(config, model.wrapped)
        self.schedule = _schedule(self.megatron, learning_rate, group.weight_decay, train_iters)

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return self.megatron.scale_loss(loss)

    def step(self) -> float:
        """Updates the parameters and the learning rate; returns the gradient norm before clipping, clipped or not.

        Raises: MegabatchError where the gradient is not finite.
        """
        self.used_learning_rate = float(self.schedule.get_lr(self.megatron.param_groups[0]))
        updated, grad_norm, _ = self.megatron.step()
        if not updated:
            raise MegabatchError("the gradient is not finite: lower the learning rate or check the last batch")
        self.schedule.step(1)
        # megatron-core computes it only where it clips; the gradients are still there
        return float(grad_norm if self.clips else self.megatron.get_grad_norm())

    @property
    def inner(self) -> list[Any]:
        """megatron-core's optimizers: one for dense parameters and, with experts, one for those."""
        return list(getattr(self.megatron, "chained_optimizers", [self.megatron]))

    @property
    def state_names(self) -> tuple[str, ...]:
        """What is kept for each parameter, `param` being the main copy."""
        return ("param", "exp_avg", "exp_avg_sq") if self.is_adam else ("param", "momentum_buffer")

    def advance(self, steps: int) -> None:
        """Moves the learning-rate schedule on by steps that were done before."""
        self.schedule.step(steps)

    def allocate_state(self, step: int) -> None:
        """Makes the state that `step` steps would have made, with zeros in it, for a checkpoint to be read into."""
        for inner in self.inner:
            if inner.optimizer is None:
                continue
            for group in inner.optimizer.param_groups:
                if "step" in group:
                    group["step"] = step  # Transformer Engine's and Apex's Adam count here, torch's for each parameter
                for parameter in group["params"]:
                    state = inner.optimizer.state[parameter]
                    for name in self.state_names[1:]:
                        state[name] = torch.zeros_like(parameter)
                    if isinstance(inner.optimizer, torch.optim.Adam | torch.optim.AdamW):
                        state["step"] = torch.tensor(float(step))

    @property
    def learning_rate(self) -> float:
        """What the last step used."""
        return self.used_learning_rate


def _schedule(
    optimizer: Any, learning_rate: LearningRate, weight_decay: float, train_iters: int
) -> OptimizerParamScheduler:
    decay = learning_rate.lr_decay_iters or train_iters
    warmup = learning_rate.lr_warmup_iters
    if learning_rate.lr_warmup_fraction is not None:
        warmup = int(learning_rate.lr_warmup_fraction * decay)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=learning_rate.lr,
        min_lr=learning_rate.min_lr,
        lr_warmup_steps=min(warmup, max(decay - 1, 0)),
        lr_decay_steps=decay,
        lr_decay_style=learning_rate.lr_decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
