"""The optimizer and its learning-rate schedule, both megatron-core's."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megabatch.config.optimization import LearningRate, Precision
from megabatch.config.optimization import Optimizer as OptimizerGroup
from megabatch.config.resolved import resolved
from megabatch.converters.mapping import Mapped
from megabatch.errors import ConfigError, MegabatchError
from megabatch.trainer.host_adam import HostAdam
from megabatch.trainer.loss_scale import LossScale
from megabatch.trainer.matrices import matrices_of, muon_and_adam
from megabatch.trainer.model.build import Model
from megabatch.trainer.model.naming import unwrap
from megabatch.trainer.muon import MOMENTUM, Muon, Rule

logger = logging.getLogger(__name__)
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types of gradients and optimizer state, by the parameters' names."""
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)


class Optimizer:
    """Adam (decoupled weight decay), SGD, or Muon with Adam, over a model's chunks, with warmup, decay and clipping.

    As in Megatron-LM: one-dimensional parameters (norms, biases) have no weight decay; with warmup, the first step's
    learning rate is `lr_warmup_init`; a step whose fp16 gradients overflow changes neither the parameters nor the
    schedule. `table` is that of the model's tensors.
    """

    def __init__(
        self,
        model: Model,
        *,
        group: OptimizerGroup,
        learning_rate: LearningRate,
        precision: Precision,
        table: Sequence[Mapped],
        train_iters: int,
        use_distributed_optimizer: bool,
        overlap_param_gather: bool,
    ) -> None:
        # that of optimizer_cpu_offload is not Transformer Engine's; the gradients' type is that of their buffers
        takes_te = group.use_precision_aware_optimizer and not group.optimizer_cpu_offload
        config = _config(
            optimizer=group.optimizer,
            lr=learning_rate.lr,
            min_lr=learning_rate.min_lr,
            weight_decay=group.weight_decay,
            apply_wd_to_qk_layernorm=group.apply_wd_to_qk_layernorm,
            clip_grad=group.clip_grad,
            adam_beta1=group.adam_beta1,
            adam_beta2=group.adam_beta2,
            adam_eps=group.adam_eps,
            sgd_momentum=group.sgd_momentum,
            bf16=model.config.bf16,
            fp16=model.config.fp16,
            initial_loss_scale=precision.initial_loss_scale,
            min_loss_scale=precision.min_loss_scale,
            loss_scale_window=precision.loss_scale_window,
            hysteresis=precision.hysteresis,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_param_gather=overlap_param_gather,
            use_precision_aware_optimizer=takes_te,
            store_param_remainders=False,  # a checkpoint holds main parameters whole
            main_grads_dtype=STATE_DTYPES[group.main_grads_dtype if takes_te else "fp32"],
            exp_avg_dtype=STATE_DTYPES[group.exp_avg_dtype],
            exp_avg_sq_dtype=STATE_DTYPES[group.exp_avg_sq_dtype],
        )
        self.is_precision_aware = group.use_precision_aware_optimizer or group.optimizer_cpu_offload
        self.clip_grad = group.clip_grad
        self.name = group.optimizer
        if group.optimizer_cpu_offload:
            _leave_main_copies_to_the_optimizer(config)
        self.megatron: Any
        if group.optimizer == "muon":
            matrices = matrices_of(model, table, split_qkv=group.muon_split_qkv)
            self.megatron = muon_and_adam(config, model, rule_of(group), matrices)
            _set_rates(self.inner, group)
        else:
            self.megatron = get_megatron_optimizer(config, model.wrapped)
        if group.optimizer_cpu_offload:
            _offload(self.inner, group)
        self._model, self._was_updated = model, False
        for inner in self.inner:
            if isinstance(inner.optimizer, _TORCH_ADAM):
                _fuse(inner.optimizer)
        self.loss_scale = LossScale.shared_by(self.inner) if config.fp16 else None
        self.schedule = schedule_of(self.megatron, learning_rate, group, train_iters=train_iters)

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return self.megatron.scale_loss(loss)

    def gradient_norm(self) -> float | None:
        """Takes the gradient from the model. The caller then decides whether to call `update` or skip the step.

        Returns: its L2 norm; None when fp16 gradients overflowed: there is no update, and the loss scale may have
        been lowered.
        Raises: MegabatchError when gradients overflow at the smallest loss scale.
        """
        self.used_learning_rate = float(self.schedule.get_lr(self.megatron.param_groups[0]))
        was_lowest = self.loss_scale is not None and self.loss_scale.is_lowest
        self.megatron.prepare_grads()
        if self.loss_scale is not None and self.loss_scale.end_step():
            if was_lowest:
                raise MegabatchError(
                    f"gradients overflow fp16 at the smallest loss scale, {float(self.loss_scale.scale):g}: train in "
                    "bfloat16, lower the learning rate, or lower precision.min_loss_scale"
                )
            return None
        return float(self.megatron.get_grad_norm())

    def update(self, grad_norm: float) -> None:
        """Clips the gradient by its norm `grad_norm`, updates the parameters and advances the learning rate."""
        if self.clip_grad > 0:
            for inner in self.inner:
                if parameters := [] if inner.is_stub_optimizer else inner.get_parameters():
                    clip_grad_by_total_norm_fp32(
                        parameters,
                        max_norm=self.clip_grad,
                        total_norm=grad_norm,
                        use_decoupled_grad=self.is_precision_aware,
                    )
        self.megatron.step_with_ready_grads()
        if not self._was_updated:
            self._was_updated = True
            self.check_host_copies()
        self.schedule.step(1)

    def take_values(self) -> None:
        """Main parameters take the model's values, after weights were loaded; host memory is allocated now."""
        self.megatron.reload_model_params()
        for host in self._offloaded():
            host.take_values()
        if self._offloaded():
            self.allocate_missing_state()
        self._was_updated = False
        self.check_host_copies()

    def values_were_restored(self) -> None:
        """After a checkpoint's main parameters were loaded beside the model's values."""
        for host in self._offloaded():
            host.give_values()
        self._was_updated = False
        self.check_host_copies()

    def check_host_copies(self) -> None:
        """Compares main parameters in host memory with the model's: after they were loaded, after the first update
        since, and before they are saved. Raises: MegabatchError that names the parameters, where they differ."""
        for inner in self.inner:
            if not isinstance(inner.optimizer, HostAdam):
                continue
            apart = set(inner.optimizer.apart(by_rounding=not self._was_updated))
            if not apart:
                continue
            places = {
                parameter: inner.optimizer.param_groups[group]["params"][order]
                for parameter, (group, order) in inner.model_param_group_index_map.items()
            }
            names = [
                name
                for chunk in self._model.wrapped
                for name, parameter in unwrap(chunk).named_parameters()
                if places.get(parameter) in apart
            ]
            raise MegabatchError(
                f"optimizer.optimizer_cpu_offload=True: main weights in host memory are not the model's weights, in "
                f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({len(names)} of this rank's parameters). "
                "Nothing of this was saved; go on from the last checkpoint with optimizer_cpu_offload=False"
            )

    def _offloaded(self) -> list[HostAdam]:
        return [inner.optimizer for inner in self.inner if isinstance(inner.optimizer, HostAdam)]

    @property
    def inner(self) -> list[Any]:
        """megatron-core's optimizers: one for dense parameters and, for an MoE model, one for experts; with Muon,
        first those of Adam."""
        return list(getattr(self.megatron, "chained_optimizers", [self.megatron]))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Main parameters and state, also those that are parts of the model's parameters; no single numbers."""
        for inner in self.inner:
            for group in [] if inner.optimizer is None else inner.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter
                    found = inner.optimizer.state.get(parameter, {}).values()
                    yield from (one for one in found if isinstance(one, torch.Tensor) and one.dim())

    def state_names(self, inner: Any) -> tuple[str, ...]:
        """Names of the state that one of `inner` keeps for each parameter; `param` is the main copy."""
        if self.name == "sgd" or isinstance(inner.optimizer, Muon):
            return ("param", MOMENTUM)
        return ("param", "exp_avg", "exp_avg_sq")

    def advance(self, steps: int) -> None:
        """Advances the learning-rate schedule by steps done in earlier attempts."""
        self.schedule.step(steps)

    def allocate_state(self, updates: int) -> None:
        """Allocates the state as it is after `updates` updates, filled with zeros, to load a checkpoint into."""
        for inner in self.inner:
            if inner.optimizer is None:
                continue
            for group in inner.optimizer.param_groups:
                if "exp_avg" in self.state_names(inner) and not isinstance(inner.optimizer, _TORCH_ADAM):
                    # Transformer Engine's and Apex's Adam count steps per group, torch's per parameter
                    group["step"] = updates
                for parameter in group["params"]:
                    self._allocate(inner, parameter, updates)

    def allocate_missing_state(self) -> None:
        """Allocates zero state where there was no update yet: with fp16, the first steps may all overflow."""
        for inner in self.inner:
            for group in [] if inner.optimizer is None else inner.optimizer.param_groups:
                for parameter in group["params"]:
                    if not inner.optimizer.state[parameter]:
                        self._allocate(inner, parameter, 0)

    def _allocate(self, inner: Any, parameter: torch.Tensor, step: int) -> None:
        if self.is_precision_aware:
            inner.optimizer.initialize_state(parameter, False)
            return
        state = inner.optimizer.state[parameter]
        for name in self.state_names(inner)[1:]:
            state[name] = torch.zeros_like(parameter)
        if isinstance(inner.optimizer, _TORCH_ADAM):
            state["step"] = torch.tensor(float(step))

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return self.used_learning_rate


def _fuse(optimizer: Any) -> None:
    """On CPUs, one pass over memory for each parameter, where torch's default makes eight; it rounds differently."""
    for group in optimizer.param_groups:
        if all(parameter.device.type == "cpu" for parameter in group["params"]):
            group["fused"] = True


def _leave_main_copies_to_the_optimizer(config: OptimizerConfig) -> None:
    """megatron-core (0.16) then handles gradients and main parameters as for Transformer Engine's precision-aware
    Adam, and builds a plain Adam, which keeps nothing before its first step: `HostAdam` takes its place."""
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True


def _offload(inner: list[Any], group: OptimizerGroup) -> None:
    elements = 0
    for one in inner:
        if one.optimizer is None:
            continue
        one.optimizer = HostAdam(
            one.optimizer.param_groups,
            fraction=group.optimizer_offload_fraction,
            overlaps=group.overlap_cpu_optimizer_d2h_h2d,
            pins=group.pin_cpu_grads,
        )
        elements += one.optimizer.host_elements
    logger.info(
        "optimizer_cpu_offload: main weights and Adam's state of %s elements are in host memory", f"{elements:,}"
    )


def _set_rates(inner: Sequence[Any], group: OptimizerGroup) -> None:
    """Gives Muon's matrices their own learning rates, which megatron-core's schedule reads from their groups."""
    rates = {"max_lr": group.muon_lr, "min_lr": group.muon_min_lr}
    for one in inner:
        for found in one.optimizer.param_groups if isinstance(one.optimizer, Muon) else ():
            found.update({name: rate for name, rate in rates.items() if rate is not None})


def rule_of(group: OptimizerGroup) -> Rule:
    """What a recipe says of Muon."""
    return Rule(
        momentum=group.muon_momentum,
        use_nesterov=group.muon_use_nesterov,
        scale_mode=group.muon_scale_mode,
        extra_scale_factor=group.muon_extra_scale_factor,
        coefficient_type=group.muon_coefficient_type,
        num_ns_steps=group.muon_num_ns_steps,
        fp32_matmul_prec=group.muon_fp32_matmul_prec,
        tp_mode=group.muon_tp_mode,
    )


def _config(**values: Any) -> OptimizerConfig:
    """Raises: ConfigError with megatron-core's words, for example if Transformer Engine is not installed."""
    try:
        return OptimizerConfig(**values)
    except (AssertionError, RuntimeError) as e:
        raise ConfigError(f"megatron-core refuses this optimizer: {e}") from e


def schedule_of(
    optimizer: Any, learning_rate: LearningRate, group: OptimizerGroup, *, train_iters: int
) -> OptimizerParamScheduler:
    """megatron-core's schedule of an optimizer's learning rate and weight decay. Raises: ConfigError when WSD's decay
    does not fit."""
    decay = learning_rate.lr_decay_iters or train_iters
    warmup = learning_rate.lr_warmup_iters
    if learning_rate.lr_warmup_fraction is not None:
        warmup = int(learning_rate.lr_warmup_fraction * decay)
    warmup = min(warmup, max(decay - 1, 0))
    if learning_rate.lr_decay_style == "WSD" and resolved(learning_rate.lr_wsd_decay_iters) > decay - warmup:
        raise ConfigError(
            f"learning_rate.lr_wsd_decay_iters={learning_rate.lr_wsd_decay_iters} must be at most {decay - warmup}, "
            f"the {decay} steps of decay less the {warmup} of warmup"
        )
    constant = group.weight_decay_incr_style == "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=learning_rate.lr_warmup_init,
        max_lr=learning_rate.lr,
        min_lr=learning_rate.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=learning_rate.lr_decay_style,
        start_wd=group.weight_decay if constant else resolved(group.start_weight_decay),
        end_wd=group.weight_decay if constant else resolved(group.end_weight_decay),
        wd_incr_steps=0 if constant else train_iters,
        wd_incr_style=group.weight_decay_incr_style,
        lr_wsd_decay_style=learning_rate.lr_wsd_decay_style,
        wsd_decay_steps=learning_rate.lr_wsd_decay_iters,
    )
