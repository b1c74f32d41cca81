"""Inverse frequencies of rotary position embeddings, with Hugging Face's scaling variants."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megabatch.errors import ConfigError
from megabatch.plan.shape import ModelShape
from megabatch.trainer.model.row import Rotation


class Rotary:
    """Cosines and sines of positions, in the dtype of the queries and keys."""

    def __init__(self, shape: ModelShape, *, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = inverse_frequencies(shape).to(device)
        self._dtype = dtype

    def __call__(self, positions_T: Tensor) -> Rotation:
        """[T, 1, D] each, on the positions' device; angles are fp32."""
        angles_TD = torch.outer(positions_T.float(), self._frequencies)
        both = torch.cat((angles_TD, angles_TD), dim=-1)[:, None]
        return both.cos().to(self._dtype), both.sin().to(self._dtype)


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """[D/2] fp32: base^(-2i/D), scaled by `rope_scaling` (RoFormer, arXiv:2104.09864, eq. 15).

    Raises: ConfigError for an unsupported rope type (dynamic, longrope, yarn).
    """
    dim = shape.kv_channels
    plain = 1.0 / (shape.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    scaling = shape.rope_scaling or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(
            plain,
            factor=float(scaling["factor"]),
            low=float(scaling["low_freq_factor"]),
            high=float(scaling["high_freq_factor"]),
            original=float(scaling["original_max_position_embeddings"]),
        )
    raise ConfigError(f"rope_type={kind!r} of {shape.architecture} is not built yet; default, linear and llama3 are")


def _llama3(plain: Tensor, *, factor: float, low: float, high: float, original: float) -> Tensor:
    """Llama 3.1: stretches wavelengths above original/low by `factor`, keeps those below original/high, blends the
    rest."""
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    scaled = torch.where(wavelength > original / low, plain / factor, plain)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, (1 - blend) * plain / factor + blend * plain, scaled)
