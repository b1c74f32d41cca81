"""Adam whose main parameters and moments are in host memory, in whole or in part, and are updated there.

megatron-core 0.16.1 has an optimizer for this, `HybridDeviceOptimizer`, which is not used. It copies parameters to the
host when it is built, before their values are loaded, and `reload_model_params` never copies fp32 main parameters.
After a resume, the step count of the part on the device stays at the value loaded: before each step
`_sync_hdo_param_groups_to_sub_optimizers` writes it back. Unless the optimizer is precision-aware, the device keeps an
fp32 copy of what is on the host. And it names CUDA throughout, so nothing of it can be tested without a GPU.

This one works on every device. On a CPU "host" and "device" are the same memory and the arithmetic is the same, which
tests use.

As Transformer Engine's precision-aware Adam it takes gradients from `decoupled_grad`, keeps main parameters itself,
makes its state at first use, and counts steps in each group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_ROUNDING = torch.finfo(torch.bfloat16).eps
"""Twice the largest relative error of a rounding to bfloat16, whose is the largest of both 16-bit types'."""
_LEAST = 2.0**-24
"""The smallest float16, whose numbers near zero have this distance."""


class HostAdam:
    """AdamW in fp32 beside parameters of any floating type.

    Of all parameters, the first ones are on the host until they are at least `fraction` of all elements. A gradient
    travels to the host in its own type; the new value travels back in the parameter's type.
    """

    def __init__(
        self, param_groups: list[dict[str, Any]], *, fraction: float, overlaps: bool = False, pins: bool = True
    ) -> None:
        """Args: param_groups: megatron-core's, with lr, betas, eps and weight_decay; overlaps: copies run in streams
        of their own, beside updates of other parameters; pins: gradients arrive in page-locked memory, on GPUs."""
        self.param_groups = param_groups
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self._host = _first_part([parameter for group in param_groups for parameter in group["params"]], fraction)
        self._ways: dict[Tensor, Tensor] = {}
        self._pins, self._overlaps = pins, overlaps

    def on_host(self, parameter: Tensor) -> bool:
        return parameter in self._host

    @property
    def host_elements(self) -> int:
        return sum(parameter.numel() for parameter in self._host)

    def initialize_state(self, parameter: Tensor, store_param_remainders: bool = False) -> None:
        """Moments of zero, and a main copy of the parameter's value as it is now."""
        assert not store_param_remainders
        value = parameter.detach()
        if self.on_host(parameter):
            main = value.to("cpu", torch.float32, copy=True)
        else:
            main = value if value.dtype == torch.float32 else value.float()  # fp32 is its own main copy
        self.state[parameter] = {
            "master_param": main,
            "exp_avg": torch.zeros_like(main),
            "exp_avg_sq": torch.zeros_like(main),
        }

    @torch.no_grad()
    def take_values(self) -> None:
        """Main copies take the parameters' values, after these were loaded."""
        for parameter, state in self.state.items():
            state["master_param"].copy_(parameter)

    @torch.no_grad()
    def give_values(self) -> None:
        """Parameters in fp32 take their main copies' values, after these were loaded: on the device they are one."""
        for parameter, state in self.state.items():
            if parameter.dtype == torch.float32:
                parameter.copy_(state["master_param"])

    @torch.no_grad()
    def apart(self, *, by_rounding: bool) -> Iterator[Tensor]:
        """Parameters on the host whose value is not their main copy in the parameter's type, bit for bit.

        Args: by_rounding: differences of roundings to 16 bits are none: a checkpoint of another type was loaded.
        """
        for parameter in self._host:
            if not self.state[parameter]:
                continue
            main, value = self.state[parameter]["master_param"], parameter.detach().cpu()
            rounded = main.to(value.dtype)
            same = (value == rounded) | (value.isnan() & rounded.isnan())
            if by_rounding:
                same |= (value.float() - main).abs() <= _ROUNDING * main.abs() + _LEAST
            if not bool(same.all()):
                yield parameter

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters that have a gradient; on return, the device's stream has their new values."""
        found = [
            (group, [one for one in group["params"] if one.decoupled_grad is not None]) for group in self.param_groups
        ]
        for group, parameters in found:
            group["step"] = group.get("step", 0) + 1
            for parameter in parameters:
                if not self.state[parameter]:
                    self.initialize_state(parameter)
        copies = _Copies(self._host, overlaps=self._overlaps)
        host = [(group, one) for group, parameters in found for one in parameters if self.on_host(one)]
        for _, parameter in host:
            copies.down(parameter.decoupled_grad, self._way(parameter))
        for group, parameters in found:  # the device computes while copies travel
            self._update(group, device := [one for one in parameters if not self.on_host(one)])
            for one in device:
                if one.dtype != torch.float32:
                    one.copy_(self.state[one]["master_param"])
        for (group, parameter), _ in zip(host, copies.arrivals(), strict=True):
            self._update(group, [parameter])
            way = self._way(parameter)
            back = way.view(parameter.dtype)[: parameter.numel()].view_as(parameter)
            back.copy_(self.state[parameter]["master_param"])
            copies.up(back, parameter)
        copies.wait()

    def _way(self, parameter: Any) -> Tensor:
        """Host memory [n] through which a gradient comes, and then the new value goes: it is no larger."""
        if parameter not in self._ways:
            self._ways[parameter] = torch.empty(
                parameter.numel(),
                dtype=parameter.decoupled_grad.dtype,
                pin_memory=self._pins and parameter.is_cuda,
            )
        return self._ways[parameter]

    def _update(self, group: dict[str, Any], parameters: Sequence[Any]) -> None:
        """One step of AdamW on main parameters that are on the same device."""
        if not parameters:
            return
        states = [self.state[one] for one in parameters]
        mains = [state["master_param"] for state in states]
        gradients = [self._way(one).view_as(one) if self.on_host(one) else one.decoupled_grad for one in parameters]
        steps = torch.full((len(mains),), float(group["step"] - 1), device=mains[0].device)
        beta1, beta2 = group["betas"]
        adamw(
            mains,
            [gradient.float() for gradient in gradients],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _first_part(parameters: Sequence[Tensor], fraction: float) -> dict[Tensor, None]:
    """The first parameters that together have at least `fraction` of the elements, in order."""
    wanted, taken = fraction * sum(one.numel() for one in parameters), 0
    found: dict[Tensor, None] = {}
    for parameter in parameters:
        if taken >= wanted:
            break
        taken += parameter.numel()
        found[parameter] = None
    return found


class _Copies:
    """One step's copies between device and host, in order.

    CUDA: gradients are read after all work queued before; values are written after it too, and later work of the
    current stream waits for them.
    """

    def __init__(self, parameters: dict[Tensor, None], *, overlaps: bool) -> None:
        self._current = self._down = self._up = None
        self._events: list[Any] = []
        self._count = 0
        if any(one.is_cuda for one in parameters):
            self._current = torch.cuda.current_stream()
            self._down, self._up = (torch.cuda.Stream() if overlaps else self._current for _ in range(2))
            for stream in (self._down, self._up):
                stream.wait_stream(self._current)

    def down(self, gradient: Tensor, way: Tensor) -> None:
        self._count += 1
        if self._down is None:
            way.copy_(gradient.reshape(-1))
            return
        with torch.cuda.stream(self._down):
            way.copy_(gradient.reshape(-1), non_blocking=True)
            self._events.append(self._down.record_event())

    def arrivals(self) -> Iterator[None]:
        """Once for each gradient, when it is there."""
        for i in range(self._count):
            if self._events:
                self._events[i].synchronize()
            yield None

    def up(self, value: Tensor, parameter: Tensor) -> None:
        if self._up is None:
            parameter.copy_(value)
            return
        with torch.cuda.stream(self._up):
            parameter.copy_(value, non_blocking=True)

    def wait(self) -> None:
        if self._current is not None and self._up is not None:
            self._current.wait_stream(self._up)
