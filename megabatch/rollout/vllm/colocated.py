"""vLLM inside the trainer's own processes, through its `external_launcher`: neighbouring ranks share an engine.

For vLLM 0.32. Each rank of an engine schedules for itself: they must get the same calls in the same order, and then
come to the same tokens. Weights come by vLLM's layerwise reload (`rollout.vllm.loading`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from megabatch.errors import MegabatchError, RolloutError
from megabatch.rollout.bucket import Bucket
from megabatch.rollout.engine import Adapter, Completion, Request, RolloutEngine, Scored
from megabatch.rollout.vllm.adapter import Taking
from megabatch.rollout.vllm.adapter import request as adapter_request
from megabatch.rollout.vllm.engine_options import (
    CPU_CACHE_BYTES,
    EngineOptions,
    check_installed,
    engine_values,
    kernel_environment,
)
from megabatch.rollout.vllm.kept_apart import kept_apart
from megabatch.rollout.vllm.loading import Loading
from megabatch.rollout.vllm.sampling import FINISH, sampling_values

_MEMORY = ("gpu_memory_utilization", "kv_cache_memory_bytes")


class Colocated:
    """This rank's part of an engine, which has random weights before the first update."""

    experts: Literal["per_expert", "fused"] = "per_expert"

    def __init__(self, options: EngineOptions, *, device: torch.device, sleeps: bool = False) -> None:
        """Collective over all ranks of the world. Args: options: `model` is a folder with a config.json; sleeps:
        whether `sleep` will be called, which vLLM must know from the start. Raises: RolloutError."""
        check_installed()
        self._options, self._on_cpus = options, device.type == "cpu"
        self._sleeps = sleeps and not self._on_cpus
        self._asleep: list[str] = []
        """vLLM's names of its parts that sleep."""
        with self._inside("vLLM does not start"):
            _prepare(on_cpus=self._on_cpus, dtype=options.dtype)
            from vllm import LLM

            self._llm: Any = LLM(**engine_arguments(options, on_cpus=self._on_cpus, sleeps=self._sleeps))
            # an engine that is collected would destroy the trainer's process groups
            self._llm.llm_engine.engine_core._finalizer.detach()
        config = self._llm.model_config
        self._most_tokens, self._vocabulary = int(config.max_model_len), int(config.get_vocab_size())
        self._taking: Loading | Taking | None = None
        """The update that has begun."""
        self._version: int | None = None
        self._has_base = False
        self._coming = 0
        """The version that is being put."""
        self._aborted: set[str] = set()
        self._paused = False

    @property
    def version(self) -> int | None:
        return self._version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        from vllm import SamplingParams

        version = self._usable()
        for request in requests:
            self._check_length(request.key, request.prompt, request.sampling.max_tokens)
        prompts = {request.key: request.prompt for request in requests}
        parameters = [SamplingParams(**sampling_values(request), detokenize=False) for request in requests]
        with self._inside("vLLM failed while it generated"):
            outputs = self._run(prompts, parameters)
        self._aborted -= prompts.keys()
        return [_completion(request, outputs.get(request.key), version) for request in requests]

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, ...]]:
        from vllm import SamplingParams

        self._usable()
        for number, (prompt, completion) in enumerate(sequences):
            self._check_length(f"sequence {number}", prompt, len(completion) + 1)
        parameters = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, seed=0, detokenize=False)
        prompts = {f"score/{number}": prompt + completion for number, (prompt, completion) in enumerate(sequences)}
        with self._inside("vLLM failed while it scored"):
            outputs = self._run(prompts, [parameters] * len(prompts))
        return [
            tuple(
                float(at[token].logprob)
                for token, at in zip(completion, outputs[key].prompt_logprobs[len(prompt) :], strict=True)
            )
            for key, (prompt, completion) in zip(prompts, sequences, strict=True)
        ]

    def _run(self, prompts: dict[str, tuple[int, ...]], parameters: Sequence[Any]) -> dict[str, Any]:
        """vLLM's last output of each request by its key; none for one that was aborted before its first token."""
        engine = self._llm.llm_engine
        adapter = None if self._options.lora_rank is None else adapter_request()
        found: dict[str, Any] = {}
        for (key, ids), one in zip(prompts.items(), parameters, strict=True):
            engine.add_request(key, {"prompt_token_ids": list(ids)}, one, lora_request=adapter)
        while engine.has_unfinished_requests():
            if ended := [key for key in prompts if key in self._aborted]:
                engine.abort_request(ended)
            found |= {output.request_id: output for output in engine.step()}
        return found

    @property
    def has_base(self) -> bool:
        return self._has_base

    def begin_update(self, version: int) -> None:
        self._begin(version, lambda worker: Loading(_model(worker), worker.model_config, worker.vllm_config))
        self._has_base = False

    def begin_adapter(self, version: int, adapter: Adapter) -> None:
        if not self._has_base:
            raise RolloutError("an adapter came before the weights below it; call begin_update first")
        self._begin(version, lambda worker: Taking(worker, adapter))

    def _begin(self, version: int, begun: Callable[[Any], Loading | Taking]) -> None:
        if self._taking is not None:
            raise RolloutError(f"update {version} began before the one before it ended; call abort_update first")
        self._version, self._coming = None, version
        with self._inside("vLLM does not take weights"):
            self._taking = begun(self._llm.collective_rpc(_worker)[0])

    def put(self, bucket: Bucket) -> None:
        if self._taking is None:
            raise RolloutError("weights came outside an update; call begin_update first")
        with self._inside(f"vLLM does not take {bucket.parts[0].name}"):
            self._taking.put(bucket)

    def end_update(self) -> None:
        taking, self._taking = self._taking, None
        if taking is None:
            raise RolloutError("an update ended that had not begun; call begin_update first")
        with self._inside("vLLM does not take the weights"):
            taking.end()
            self._llm.reset_prefix_cache()
        self._version, self._has_base = self._coming, True

    def abort_update(self) -> None:
        """Ends a reload with what came, so that the next one can begin."""
        taking, self._taking, self._version = self._taking, None, None
        if isinstance(taking, Loading):
            with self._inside("vLLM does not end an update"):
                taking.end()

    def differing(self, bucket: Bucket) -> list[str] | None:
        """vLLM keeps tensors in the form that its kernels want."""
        return None

    def members(self) -> list[RolloutEngine]:
        return [self]

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def sleep(self, level: int) -> None:
        """Does nothing on CPUs, where vLLM cannot sleep."""
        if not level or not self._sleeps or self._asleep:
            return
        with self._inside("vLLM does not sleep"):
            self._llm.sleep(level)
        self._asleep = ["weights", "kv_cache"]
        if level >= 2:
            self._version, self._has_base = None, False

    def wake(self, *, cache: bool = True) -> None:
        for part in [one for one in self._asleep if cache or one != "kv_cache"]:
            with self._inside("vLLM does not wake"):
                self._llm.wake_up(tags=[part])
            self._asleep.remove(part)

    def abort(self, keys: Collection[str]) -> None:
        """From another thread, while this one generates. Raises: RolloutError where ranks share the engine: they could
        not all stop at the same token."""
        if self._options.tensor_parallel_size > 1:
            raise RolloutError("requests cannot be aborted in an engine that several ranks share")
        self._aborted |= set(keys)

    def health(self) -> None:
        self._usable()

    def close(self) -> None:
        del self._llm

    @contextmanager
    def _inside(self, failing: str) -> Iterator[None]:
        """Keeps what vLLM does to the process from the trainer, and says its errors in one line.

        Args: failing: what vLLM does not do if there is one. Raises: RolloutError.
        """
        with kept_apart(), self._without_compiling():
            try:
                yield
            except MegabatchError:
                raise
            except Exception as e:
                text = " ".join(str(e).split())
                raise RolloutError(f"{failing}: {type(e).__name__}: {text[:500]}") from e

    def _without_compiling(self) -> AbstractContextManager[Any]:
        """On CPUs vLLM runs a C++ compiler for parts of its sampler, in eager mode too, for seconds to minutes."""
        if self._on_cpus and self._options.enforce_eager:
            return torch.compiler.set_stance("force_eager")
        return nullcontext()

    def _usable(self) -> int:
        """The version of the weights. Raises: RolloutError."""
        if self._asleep:
            raise RolloutError("the engine sleeps; call wake first")
        if self._paused:
            raise RolloutError("the engine is paused; call resume first")
        if self._version is None:
            raise RolloutError("the engine has no weights: none came yet, or an update failed; send all of them again")
        return self._version

    def _check_length(self, name: str, prompt: Sequence[int], more: int) -> None:
        """Raises: RolloutError. vLLM itself would lower the number of tokens without a word."""
        if not prompt or min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise RolloutError(
                f"{name}: a prompt needs tokens between 0 and {self._vocabulary - 1}, and has {len(prompt)}"
                + (f" from {min(prompt)} to {max(prompt)}" if prompt else "")
            )
        if len(prompt) + more > self._most_tokens:
            raise RolloutError(
                f"{name}: {len(prompt)} tokens of a prompt and {more} of a completion are more than the engine's "
                f"max_model_len={self._most_tokens}; raise rollout.vllm_max_model_len, or lower data.max_length or "
                "rollout.max_completion_length"
            )


def engine_arguments(options: EngineOptions, *, on_cpus: bool, sleeps: bool) -> dict[str, Any]:
    """Of vLLM's `LLM`."""
    values = {
        "distributed_executor_backend": "external_launcher",
        "skip_tokenizer_init": True,
        # the first update brings the weights
        "load_format": "dummy",
        "seed": 0,
        "disable_log_stats": True,
        "enable_sleep_mode": sleeps,
        **engine_values(options),
    }
    if on_cpus and not values.keys() & set(_MEMORY):
        values["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    if on_cpus:
        # a part of a prompt draws with the request's generator at an offset, which generators on CPUs do not have
        values.setdefault("enable_chunked_prefill", False)
    return values


def _prepare(*, on_cpus: bool, dtype: str | None) -> None:
    """What vLLM reads from the environment as it is imported and started."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    for name, value in {"VLLM_LOGGING_LEVEL": "ERROR", **kernel_environment(dtype)}.items():
        os.environ.setdefault(name, value)
    if on_cpus:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        _without_shared_memory()


def _without_shared_memory() -> None:
    """On CPUs vLLM 0.32 would exchange through files in /dev/shm, which have the same name in every job on a node and
    are left behind. It uses the process group instead where ranks disagree about the name."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    def arguments(self: Any) -> tuple[str, int, int]:
        rank = int(os.environ["RANK"])
        return f"env://:{rank}", rank, int(os.environ["LOCAL_RANK"])

    ExecutorWithExternalLauncher._distributed_args = arguments


def _worker(worker: Any) -> Any:
    return worker


def _model(worker: Any) -> Any:
    return worker.model_runner.get_model()


def _completion(request: Request, output: Any, version: int) -> Completion:
    if output is None:
        return Completion(key=request.key, ids=(), logps=(), versions=(), finish="aborted")
    (one,) = output.outputs
    ids = tuple(one.token_ids)
    logps = tuple(float(at[token].logprob) for token, at in zip(ids, one.logprobs or (), strict=True))
    finish = FINISH[one.finish_reason] if output.finished else "aborted"
    return Completion(key=request.key, ids=ids, logps=logps, versions=(version,) * len(ids), finish=finish)
