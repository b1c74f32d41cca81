"""megatron-core on a machine without CUDA: every adaptation in one place, each with its reason and version range.

megatron-core names the device in its source: `torch.cuda.current_device()`, `device="cuda"`, CUDA streams, CUDA
generators. Rather than change torch for the whole process, `adapt()` gives each loaded `megatron.core` module its own
copy of the `torch` module in which those names mean the CPU. torch itself, and everything else that uses it, stays as
it is, except for the two method patches at the end and what `uncompiled` changes. Checked with megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from megabatch.trainer.megatron_imports import without_trackers
from megabatch.trainer.uncompiled import decorated_with_nothing, run_uncompiled

MODULES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel",
    "megatron.core.fusions.fused_cross_entropy",
)
"""What the trainer uses of megatron-core; they must be loaded before they are adapted."""

FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


class _Stream:
    """Stands for a CUDA stream or event: the CPU runs in order, so every operation is already complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> _Stream:
        return self

    wait = wait_stream = wait_event = record = record_event = record_stream = synchronize = _nothing

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` with a CUDA device read as the CPU (0.16-0.19: overflow buffers, token counts, router statistics)."""

    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _copy(module: ModuleType, **overrides: Any) -> ModuleType:
    """A module with the same names as `module`, except for `overrides`."""
    clone = ModuleType(module.__name__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__.update(overrides)
    clone.__dict__.setdefault("__getattr__", lambda name: getattr(module, name))  # names that torch loads lazily
    return clone


def _ints(sizes: Any) -> Any:
    return None if sizes is None else [int(x) for x in sizes]


def _all_to_all_single(
    output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
) -> Any:
    """gloo takes split sizes as lists of int only; the MoE dispatcher passes arrays (0.16-0.19)."""
    return torch.distributed.all_to_all_single(
        output, input, _ints(output_split_sizes), _ints(input_split_sizes), **kwargs
    )


def _all_gather(
    outputs: Sequence[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """gloo gathers equal sizes only; the MoE dispatcher gathers unequal row counts over tp x ep (0.16-0.19)."""
    rows = [x.shape[0] for x in outputs]
    if len(set(rows)) == 1:
        return torch.distributed.all_gather(list(outputs), tensor.contiguous(), group=group, async_op=async_op)
    padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in rows]
    torch.distributed.all_gather(gathered, padded, group=group)
    for output, source in zip(outputs, gathered, strict=True):
        output.copy_(source[: output.shape[0]])
    return None


def _reduce_scatter(output: torch.Tensor, inputs: Sequence[torch.Tensor], group: Any = None, **kwargs: Any) -> Any:
    """gloo reduce-scatters equal sizes only: reduce all, keep this rank's part (0.16-0.19, MoE with tp x ep)."""
    whole = torch.cat([x.contiguous() for x in inputs])
    torch.distributed.all_reduce(whole, group=group)
    output.copy_(whole.split([x.shape[0] for x in inputs])[torch.distributed.get_rank(group)])


def _cuda() -> ModuleType:
    """A `torch.cuda` whose device is the CPU and whose generator is the default one."""
    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    return _copy(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=nothing,
        empty_cache=nothing,
        set_device=nothing,
        Stream=_Stream,
        Event=_Stream,
        current_stream=_Stream,
        default_stream=_Stream,
        stream=_stream_context,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        memory_allocated=lambda *args: 0,
        max_memory_allocated=lambda *args: 0,
        is_available=lambda: False,
    )


def _torch() -> ModuleType:
    distributed = _copy(
        torch.distributed,
        all_to_all_single=_all_to_all_single,
        all_gather=_all_gather,
        reduce_scatter=_reduce_scatter,
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in FACTORIES}
    return _copy(torch, cuda=_cuda(), distributed=distributed, **factories)


def _cuda_type_name(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`tensor.type()` as CUDA spells it: the optimizers sort parameters by these strings (0.16-0.19)."""
    if dtype is not None:
        return _tensor_type(tensor, dtype, *args, **kwargs)
    return _tensor_type(tensor).replace("torch.", "torch.cuda.", 1)


_tensor_type = torch.Tensor.type


def adapt() -> None:
    """Makes megatron-core usable without CUDA in this process; calling it again does nothing.

    Nothing is compiled: for the CPU that needs a C++ compiler on the machine and changes the numbers between compiled
    and plain code. What megatron-core would compile is decorated with nothing (0.16-0.19).
    """
    if _cuda_type_name is torch.Tensor.type:
        return
    run_uncompiled()
    with decorated_with_nothing(), without_trackers():
        for name in MODULES:
            importlib.import_module(name)
    on_cpu = _torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.__dict__["torch"] = on_cpu
    _adapt_rng()
    adapt_router()
    _adapt_norm()
    _adapt_lone_collectives()
    _keep_freed_memory()
    torch.Tensor.type = _cuda_type_name
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor


def _adapt_rng() -> None:
    """Keeps the states of tensor-parallel generators in the CPU's generator instead of CUDA's (0.16-0.19)."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    # dropout with one of these generators then changes the CPU's, of which megatron-core warns every time
    warning = "CPU RNG state changed within GPU RNG context"
    logging.getLogger(random.__name__).addFilter(lambda record: record.msg != warning)


def _adapt_norm() -> None:
    """On CPUs `torch.norm` adds up fp32 squares in fp32: 5e-6 off at a million elements, and as clipping scales by it,
    so would be the update, differently for each layout (0.16-0.19 without Transformer Engine and Apex)."""
    clipping: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    clipping.l2_norm_impl = _l2_norm


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for tensors in tensor_lists for x in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1), None


def _adapt_lone_collectives() -> None:
    """In a group of one gloo copies gradients and parameters through a buffer of its own and another thread, though
    they lie where they belong already (0.16-0.19)."""
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            return collective(output, input, *args, group=group, **kwargs)
        if output.data_ptr() != input.data_ptr():
            output.copy_(input)
        return None

    return run


def _keep_freed_memory() -> None:
    """glibc gives large tensors back to the kernel as soon as they are freed, and every layer would have its memory
    zeroed and mapped anew: about a tenth of a step. Other C libraries are left as they are."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def adapt_router() -> None:
    """Defines a name that 0.16's router reads without importing it if there is no Transformer Engine, CUDA or not."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
