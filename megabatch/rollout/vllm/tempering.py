"""Log-probabilities of prompts at the temperature of their request.

vLLM 0.32 gives those of the model's logits, in every `logprobs_mode`: prompts skip what is done to logits before
sampling. Within `patch` the workers of our servers divide a prompt's logits by its request's temperature, in fp32, in
both of vLLM's model runners; the first is used without Triton, so on CPUs. At temperature 1 nothing changes. A trainer
that asks for another temperature proves beforehand that its servers do this (`scoring`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def patch() -> None:
    """Of vLLM's classes, in this process; called again it does nothing."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not hasattr(GPUModelRunner, "_megabatch_tempers"):
        GPUModelRunner._megabatch_tempers = True
        GPUModelRunner._get_prompt_logprobs_dict = _by_temperature(GPUModelRunner._get_prompt_logprobs_dict)
        if HAS_TRITON:
            _patch_second_runner()


def _by_temperature(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The first runner's method, which goes through the requests in `num_prompt_logprobs` and takes those out that
    are done: called for the requests of each temperature."""

    def found(self: Any, *arguments: Any) -> dict[str, Any]:
        asked: dict[str, int] = self.num_prompt_logprobs
        temperatures = {name: _of(self.requests[name].sampling_params) for name in asked}
        results: dict[str, Any] = {}
        for temperature in sorted(set(temperatures.values())):
            its = [name for name, own in temperatures.items() if own == temperature]
            self.num_prompt_logprobs = left = {name: asked[name] for name in its}
            self.sampler.compute_logprobs = _divided(type(self.sampler).compute_logprobs, temperature)
            try:
                results |= original(self, *arguments)
            finally:
                self.num_prompt_logprobs = asked
                del self.sampler.compute_logprobs
            for name in set(its) - set(left):
                del asked[name]
        return results

    return found


def _of(parameters: Any) -> float:
    """0 says that a request draws the likeliest token, and nothing of its prompt."""
    return parameters.temperature or 1.0


def _divided(compute: Callable[[Tensor], Tensor], temperature: float) -> Callable[[Tensor], Tensor]:
    return compute if temperature == 1.0 else lambda logits: compute(logits.float() / temperature)


def _patch_second_runner() -> None:
    """It computes the prompts of a batch together, a part of the rows after the other."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    add, compute = PromptLogprobsWorker.add_request, PromptLogprobsWorker.compute_prompt_logprobs

    def add_request(self: Any, name: str, number: int, parameters: Any) -> None:
        if not hasattr(self, "megabatch_temperatures"):
            self.megabatch_temperatures = torch.ones(self.max_num_reqs)
        self.megabatch_temperatures[number] = _of(parameters)
        add(self, name, number, parameters)

    def compute_prompt_logprobs(self: Any, logits_of: Any, hidden: Tensor, batch: Any, *more: Any) -> Any:
        temperatures = getattr(self, "megabatch_temperatures", None)
        if temperatures is not None:
            of_requests = temperatures[torch.from_numpy(batch.idx_mapping_np).long()]
            logits_of = row_by_row(logits_of, of_requests, torch.from_numpy(batch.num_scheduled_tokens))
        return compute(self, logits_of, hidden, batch, *more)

    PromptLogprobsWorker.add_request = add_request
    PromptLogprobsWorker.compute_prompt_logprobs = compute_prompt_logprobs


def row_by_row(
    logits_of: Callable[[Tensor], Tensor], temperatures_R: Tensor, lengths_R: Tensor
) -> Callable[[Tensor], Tensor]:
    """`logits_of`, called for one part of the rows after the other, with each row divided by its temperature.

    Args: temperatures_R, lengths_R: of each request, and its rows.
    """
    temperatures_T = temperatures_R.repeat_interleave(lengths_R.long())
    if bool((temperatures_T == 1.0).all()):
        return logits_of
    place = 0

    def divided(hidden_tH: Tensor) -> Tensor:
        nonlocal place
        logits_tV = logits_of(hidden_tH)
        own_t = temperatures_T[place : place + len(hidden_tH)].to(logits_tV.device)
        place += len(hidden_tH)
        return logits_tV.float() / own_t[:, None]

    return divided
