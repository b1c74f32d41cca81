"""adapter_config.json: which ranks and scales its tensors have. What changes numbers is honoured or refused by name.

Matching is PEFT's (peft 0.21, `tuners_utils.check_target_module_exists` and `utils.other.get_pattern_key`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megabatch.converters.regular_files import read_regular
from megabatch.converters.safe_regex import check_pattern, matches
from megabatch.converters.safetensors_io.header import parse_object
from megabatch.errors import ConversionError

NAME = "adapter_config.json"
_HONOURED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "target_parameters", "modules_to_save", "bias", "layers_to_transform", "layers_pattern", "init_lora_weights",
}  # fmt: skip
_NO_NUMBERS = {
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "lora_dropout", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config", "runtime_config",
}  # fmt: skip
"""Keys that do not affect what trained adapters add to the weights."""
_INITIAL = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base model unchanged; others change its weights whenever an adapter is loaded."""
_MERGE = "merge it with peft (merge_and_unload, then save_pretrained), and use that model without an adapter"
_NOT_MERGED = {
    "alora_invocation_tokens": "it applies to some tokens alone, and peft cannot merge it either",
    "lora_bias": "peft can merge it only where every adapted layer has a bias",
}
_BIASES = ("none", "all", "lora_only")


def scale_of(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """The factor on B @ A: alpha / rank, or alpha / sqrt(rank) when rank-stabilised (arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


@dataclass(frozen=True)
class AdapterConfig:
    """A checked config."""

    path: Path
    values: dict[str, Any]
    """As the file has them."""

    @property
    def bias(self) -> str:
        return str(self.values.get("bias") or "none")

    @property
    def modules_to_save(self) -> list[str]:
        return list(self.values.get("modules_to_save") or [])

    @cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.values.get("target_modules") or ())

    @cached_property
    def _target_parameters(self) -> frozenset[str]:
        return frozenset(self.values.get("target_parameters") or ())

    def rank(self, key: str) -> int:
        """Rank of a module or parameter of the model, by its full name."""
        return int(self._by_pattern("rank_pattern", key, self.values.get("r", 8)))

    def alpha(self, key: str) -> float:
        return float(self._by_pattern("alpha_pattern", key, self.values.get("lora_alpha", 8)))

    def scale(self, key: str, rank: int) -> float:
        """What B @ A is multiplied by."""
        return scale_of(self.alpha(key), rank, use_rslora=bool(self.values.get("use_rslora")))

    def alpha_for(self, scale: float, rank: int) -> float:
        """The inverse of `scale`."""
        alpha = scale * (math.sqrt(rank) if self.values.get("use_rslora") else rank)
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    def _by_pattern(self, field: str, key: str, default: Any) -> Any:
        patterns: Mapping[str, Any] = self.values.get(field) or {}
        found = (value for pattern, value in patterns.items() if self._fits(field, rf"(.*\.)?({pattern})$", key))
        return next(found, default)

    def _fits(self, field: str, pattern: str, name: str, *, whole: bool = False) -> bool:
        """Whether a pattern, with what PEFT puts around it, matches a name."""
        try:
            return matches(pattern, name, whole=whole)
        except ConversionError as error:
            raise ConversionError(f"{self.path}: {field}: {error}") from error

    def targets(self, module: str) -> bool:
        """Whether the module has an adapter."""
        wanted = self.values.get("target_modules")
        if wanted is None or self._excludes(module):
            return False
        if isinstance(wanted, str):
            return wanted == "all-linear" or self._fits("target_modules", wanted, module, whole=True)
        if module in self._targets:
            return True
        if not _ends_with(module, self._targets):
            return False
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        layer = self._layer(module)
        return layer is not None and layer in (layers if isinstance(layers, list) else [layers])

    def _excludes(self, module: str) -> bool:
        excluded = self.values.get("exclude_modules") or []
        if isinstance(excluded, str):
            found = self._fits("exclude_modules", excluded, module, whole=True)
        else:
            found = _ends_with(module, frozenset(excluded))
        return found or any(
            self._fits("modules_to_save", rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save
        )

    def _layer(self, module: str) -> int | None:
        """The first number behind a name of layers."""
        pattern = self.values.get("layers_pattern")
        names = [pattern] if isinstance(pattern, str) and pattern else pattern if isinstance(pattern, list) else []
        places = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
        place = next((place for place in places if self._fits("layers_pattern", place, module)), None)
        found = None if place is None else re.match(place, module)
        return None if found is None else int(found[1])

    def targets_parameter(self, parameter: str) -> bool:
        """Whether the parameter itself has an adapter, not the module that it belongs to."""
        return _ends_with(parameter, self._target_parameters)


def _ends_with(name: str, ends: frozenset[str]) -> bool:
    """Whether the name, or what stands behind one of its dots, is one of the ends."""
    parts = name.split(".")
    return bool(ends) and any(".".join(parts[at:]) in ends for at in range(len(parts)))


def read_config(path: Path) -> AdapterConfig:
    """Raises: ConversionError for keys that are missing, mistyped, or change numbers in unsupported ways."""
    return checked(path, parse_object(read_regular(path), path, what="adapter config"))


def checked(path: Path, values: dict[str, Any]) -> AdapterConfig:
    """As `read_config`, for values that are there."""
    if str(values.get("peft_type")).upper() != "LORA":
        raise ConversionError(f"{path}: peft_type={values.get('peft_type')!r} is not supported; only LORA is")
    for key, value in values.items():
        if key not in _HONOURED | _NO_NUMBERS and value not in (None, False, [], {}):
            raise ConversionError(
                f"{path}: {key}={_short(value)} is not supported: it changes what the adapter adds to the weights; "
                f"{_NOT_MERGED.get(key, _MERGE)}"
            )
    if values.get("init_lora_weights", True) not in _INITIAL:
        raise ConversionError(
            f"{path}: init_lora_weights={values['init_lora_weights']!r} is not supported: the base model's weights "
            f"were changed when training began; {_MERGE}, or save the adapter with its "
            "path_initial_model_for_weight_conversion"
        )
    if values.get("bias", "none") not in _BIASES:
        raise ConversionError(f"{path}: bias={_short(values['bias'])} must be one of {', '.join(_BIASES)}")
    _check_ranks(path, values)
    _check_names(path, values)
    return AdapterConfig(path, values)


def _check_ranks(path: Path, values: Mapping[str, Any]) -> None:
    for field, default in (("r", 8), ("lora_alpha", 8)):
        if not _is_number(values.get(field, default), whole=field == "r"):
            raise ConversionError(f"{path}: {field}={_short(values[field])} must be a positive number")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(field) or {}
        if not isinstance(patterns, dict):
            raise ConversionError(f"{path}: {field}={_short(patterns)} must map patterns to numbers")
        for pattern, value in patterns.items():
            if not _is_number(value, whole=field == "rank_pattern"):
                raise ConversionError(f"{path}: {field}[{pattern!r}]={_short(value)} must be a positive number")
            _check_regex(path, field, pattern)
    if values.get("use_rslora") not in (None, True, False):
        raise ConversionError(f"{path}: use_rslora={_short(values['use_rslora'])} must be true or false")


def _check_names(path: Path, values: Mapping[str, Any]) -> None:
    for field in ("target_modules", "exclude_modules"):
        given = values.get(field)
        if isinstance(given, str):
            _check_regex(path, field, given)
        elif given is not None and not _is_names(given):
            raise ConversionError(f"{path}: {field}={_short(given)} must be a list of names, or a regular expression")
    for field in ("target_parameters", "modules_to_save"):
        if values.get(field) is not None and not _is_names(values[field]):
            raise ConversionError(f"{path}: {field}={_short(values[field])} must be a list of names")
    for name in values.get("modules_to_save") or []:
        _check_regex(path, "modules_to_save", name)


def _is_number(value: object, *, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1e9


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _check_regex(path: Path, field: str, pattern: str) -> None:
    try:
        check_pattern(pattern)
    except ConversionError as error:
        raise ConversionError(f"{path}: {field}: {error}") from error


def _short(value: object) -> str:
    return repr(value)[:80]


def dump(values: Mapping[str, Any]) -> bytes:
    """The text of a config, as PEFT writes it; patterns stay in their order, since the first that fits counts."""
    return json.dumps(dict(sorted(values.items())), indent=2).encode()
