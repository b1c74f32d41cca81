"""Other spellings of keys: of other versions and layers of megatron-core, and of programs that wrap the model."""

from __future__ import annotations

from collections.abc import Collection

WRAPPERS = ("module.", "model.")
"""Prefixes that every key of a model may have; a wrapper may be inside another."""

_NORM = ".self_attention.linear_qkv.layer_norm_"
_DENSE, _EXPERTS = ".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."
SPELLINGS = (
    (_NORM, ".input_layernorm."),
    (_DENSE, _EXPERTS),
    (_EXPERTS, _DENSE),
    (".transformer_layer.", ".mtp_model_layer."),
)
"""A part of a key as Transformer Engine's layers write it, and what other layers write for the same tensor: the local
ones keep the attention's norm outside of the projection, and the norm before experts inside of it."""


def unwrapped(keys: Collection[str]) -> dict[str, str]:
    """New names for keys that all lie in the same wrappers."""
    prefix = ""
    while keys and (more := [one for one in WRAPPERS if all(key.startswith(prefix + one) for key in keys)]):
        prefix += more[0]
    return {key: key.removeprefix(prefix) for key in keys} if prefix else {}


def respelled(expected: Collection[str], keys: Collection[str]) -> dict[str, str]:
    """The expected name for each key that is another spelling of one, where that one is not there itself."""
    spare = set(keys) - set(expected)
    return {
        key.replace(ours, other): key
        for key in expected
        if key not in keys
        for ours, other in SPELLINGS
        if ours in key and key.replace(ours, other) in spare
    }


_OPTIMIZER = ("optimizer.", "chained_", "rerun_state_machine_state", "rng_state", "frozen.")


def is_optimizer(key: str) -> bool:
    """Whether a key is of the optimizer's state, of random generators or of another model of the run (`frozen.`), not
    of the model."""
    return key.startswith(_OPTIMIZER)
