#!/bin/bash
# What both images hold: run as root in a CUDA development image of Ubuntu 24.04, from the root of a checkout.
set -euo pipefail

TRANSFORMER_ENGINE=2.20.2
FLASH_ATTN=2.8.3
VLLM=0.32.0
# Hopper and Blackwell; every further architecture adds minutes to the build
ARCHITECTURES="${ARCHITECTURES:-90;100}"
export MAX_JOBS="${MAX_JOBS:-8}" DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1

apt-get update
# the verbs libraries let NCCL reach InfiniBand and RoCE
apt-get install -y --no-install-recommends python3 python3-dev python3-venv git ninja-build cmake \
    libibverbs1 ibverbs-providers librdmacm1t64 libnuma1
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/megabatch
export PATH="/opt/megabatch/bin:$PATH"
pip install --constraint constraints.txt setuptools wheel packaging pybind11 '.[train]'
# jobs bring their code as a snapshot: a copy in the image would hide what is missing from it
pip uninstall -y megabatch

# built for this torch, against its own cuDNN and NCCL
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
export CUDNN_PATH="$site/cudnn" CPLUS_INCLUDE_PATH="$site/cudnn/include:$site/nccl/include"
export LIBRARY_PATH="$site/cudnn/lib:$site/nccl/lib"
export NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="$ARCHITECTURES" FLASH_ATTN_CUDA_ARCHS="$ARCHITECTURES"
pip install --no-build-isolation "transformer-engine[pytorch,core-cu13]==$TRANSFORMER_ENGINE"
pip install --no-build-isolation "flash-attn==$FLASH_ATTN"

if [ -n "${APEX:-}" ]; then
    git clone --depth 1 --branch "$APEX" https://github.com/NVIDIA/apex /tmp/apex
    pip install --no-build-isolation --config-settings '--build-option=--cpp_ext --cuda_ext' /tmp/apex
    rm -rf /tmp/apex
fi

# the one vLLM that goes with this torch, in the same environment: rollouts may share the trainer's processes
if [ -n "${WITH_VLLM:-}" ]; then
    pip install --constraint constraints.txt "vllm==$VLLM"
fi
