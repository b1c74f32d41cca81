"""Floating-point operations of a step: the matrices against the tensor tables, attention against its own sum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megabatch.converters.families import FAMILIES, family_of
from megabatch.plan.flops import matmul_parameters, peak_tflops, training_flops
from megabatch.plan.gpus import GPUS
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.plan.shape import ModelShape


def _shape(name: str) -> ModelShape:
    """Three layers of a published model, so that its table stays small."""
    shape = family_of(KNOWN_MODELS[name]).shape(KNOWN_MODELS[name])
    return replace(shape, num_layers=3, moe_layers=(True,) * 3 if shape.num_experts else ())


def _multiplied(shape: ModelShape) -> float:
    """Elements of all matrices of the Hugging Face tensors, an expert's by the part of the tokens that choose it."""
    part = (shape.moe_router_topk or 0) / (shape.num_experts or 1)
    total = 0.0
    for name, size in FAMILIES[shape.model_type].hf_tensors(shape).items():
        if len(size) >= 2 and "embed_tokens" not in name:
            total += math.prod(size) * (part if ".experts." in name else 1)
    return total


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-8B", "Qwen/Qwen2.5-7B-Instruct"])
def test_weights_that_a_token_meets_are_the_matrices_of_the_model(name: str) -> None:
    shape = replace(_shape(name), untie_embeddings_and_output_weights=True)
    assert matmul_parameters(shape) == pytest.approx(_multiplied(shape), rel=1e-12)


def test_a_tied_output_layer_is_multiplied_all_the_same() -> None:
    tied = replace(_shape("Qwen/Qwen3-8B"), untie_embeddings_and_output_weights=False)
    assert matmul_parameters(tied) == matmul_parameters(replace(tied, untie_embeddings_and_output_weights=True))


@pytest.mark.parametrize("lengths", [(5,), (1,), (3, 8, 20)])
def test_attention_counts_each_pair_of_tokens_that_see_each_other(lengths: tuple[int, ...]) -> None:
    """Q K^T and weights V are 2 operations for each pair and channel; backward is twice the forward.

    The formula takes half of n^2 for the n (n + 1) / 2 pairs of a causal sequence.
    """
    shape = _shape("Qwen/Qwen3-8B")
    tokens = sum(lengths)
    mean_length = sum(n * n for n in lengths) / tokens
    channels = shape.num_attention_heads * shape.kv_channels
    pairs = sum(n * n / 2 for n in lengths)
    attention = 3 * shape.num_layers * pairs * channels * (2 + 2)
    expected = 6 * tokens * matmul_parameters(shape) + attention
    assert training_flops(shape, tokens=tokens, mean_length=mean_length) == pytest.approx(expected, rel=1e-12)


def test_shared_experts_serve_every_token() -> None:
    shape = _shape("Qwen/Qwen3-30B-A3B")
    shared = replace(shape, moe_shared_expert_intermediate_size=100)
    assert matmul_parameters(shared) - matmul_parameters(shape) == 3 * 3 * shape.hidden_size * 100


def test_the_well_known_6_n_d() -> None:
    """Qwen3-8B has 7.57 B parameters beside its input embedding; short sequences cost 6 operations for each."""
    shape = family_of(KNOWN_MODELS["Qwen/Qwen3-8B"]).shape(KNOWN_MODELS["Qwen/Qwen3-8B"])
    assert training_flops(shape, tokens=1, mean_length=0) == pytest.approx(6 * 7.57e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_peaks_are_found_by_the_name_that_cuda_reports(name: str, device: str) -> None:
    assert peak_tflops(name) == GPUS[device].peak_tflops


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA A10", "Tesla V100-SXM2-32GB", ""])
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_tflops(name) is None
