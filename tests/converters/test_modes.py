"""Every argument, of functions and of the command, is used or refused by name: never without effect in silence."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.command import main
from megabatch.converters.command.flags import FLAGS
from megabatch.converters.conversion import make_plan
from megabatch.converters.request import Mode
from megabatch.errors import ConversionError

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from made_folders import MOE, make_folder

OF_THE_COMMAND = {
    "output_dir", "exist_ok", "workers", "resume", "verify", "dry_run", "test_convert_precision", "test_convert_dtype",
    "rank", "world", "help",
}  # fmt: skip
OF_RUNNING = {"output_dir", "exist_ok", "workers", "resume", "verify", "rank", "world", "say"}
VALUES = {
    "mcore_model": "c", "torch_dtype": "float32", "max_shard_size": "100KB", "expert_layout": "fused",
    "fp8_quantise": True, "accept_bin": True, "peft_format": "fused",
    "layer_keys": "per_layer",
}  # fmt: skip
OF_MODELS = {"mcore_model", "torch_dtype", "max_shard_size", "expert_layout", "fp8_quantise"}
REFUSED: list[tuple[dict[str, Any], set[str]]] = [
    (
        {"to_mcore": True, "model": "m"},
        {"mcore_model", "max_shard_size", "expert_layout", "fp8_quantise", "peft_format"},
    ),
    (
        {"to_mcore": True, "model": "m", "adapters": ["a"], "merge_lora": True},
        {"mcore_model", "max_shard_size", "expert_layout", "fp8_quantise", "peft_format"},
    ),
    ({"to_hf": True, "mcore_model": "c"}, {"accept_bin", "peft_format", "layer_keys"}),
    ({"to_hf": True, "mcore_model": "c", "adapters": ["a"], "merge_lora": True}, {"peft_format", "layer_keys"}),
    ({"to_hf": True, "model": "m", "torch_dtype": "float16"}, {"peft_format", "layer_keys"}),
    ({"to_hf": True, "model": "m", "max_shard_size": "1GB"}, {"peft_format", "layer_keys"}),
    ({"to_mcore": True, "adapters": ["a"]}, {*OF_MODELS, "peft_format"}),
    ({"to_hf": True, "adapters": ["a"]}, {*OF_MODELS, "layer_keys"}),
]
"""Arguments of each mode, and those that mean nothing in it; all the others of `VALUES` do."""


@pytest.mark.parametrize(("given", "refused"), REFUSED)
def test_what_has_no_effect_is_refused_by_name(
    given: dict[str, Any], refused: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in VALUES.items():
        if name in given:
            continue
        line = _line({**given, name: value})
        if name in refused:
            with pytest.raises(ConversionError, match=rf"^{name} is about|^{name} is the checkpoint"):
                convert(ConversionRequest(**given, **{name: value}), output_dir="o")
            assert main(line) == 2
            assert f"error: --{name} is " in capsys.readouterr().err
        else:  # it is the folders that are not there
            assert main([*line, "--dry_run"]) == 1
            assert f"--{name}" not in capsys.readouterr().err


def _line(given: dict[str, Any]) -> list[str]:
    words = ["--output_dir", "o"]
    for name, value in given.items():
        words += [f"--{name}", *([] if value is True else value if isinstance(value, list) else [value])]
    return words


def test_all_that_has_no_effect_is_named_at_once() -> None:
    with pytest.raises(ConversionError, match=r"mcore_model is .*; max_shard_size, fp8_quantise are about"):
        convert(
            ConversionRequest(to_mcore=True, model="m", mcore_model="c", max_shard_size=1, fp8_quantise=True),
            output_dir="o",
        )


@pytest.mark.parametrize("rank_world", [(2, 2), (-1, 1), (0, 0)])
def test_ranks_that_would_do_nothing_are_refused(rank_world: tuple[int, int], folders: Any, tmp_path: Path) -> None:
    rank, world = rank_world
    with pytest.raises(ConversionError, match=rf"rank={rank} .* world={world}"):
        convert(
            ConversionRequest(to_mcore=True, model=folders["model"]), output_dir=tmp_path / "o", rank=rank, world=world
        )


def test_every_flag_is_an_argument_or_the_commands_own() -> None:
    arguments = {argument.name for argument in fields(ConversionRequest)}
    assert set(FLAGS) == arguments | OF_THE_COMMAND
    assert set(inspect.signature(convert).parameters) == {"request"} | OF_RUNNING
    for argument in fields(ConversionRequest):
        assert argument.metadata["help"]
        alike = set(argument.metadata["modes"]) == set(Mode)
        assert alike == (not argument.metadata["elsewhere"]), f"{argument.name}: no error where it is not used"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("modes")
    hf = make_folder(folder / "hf", MOE)
    convert(ConversionRequest(to_mcore=True, model=hf), output_dir=folder / "mcore")
    return {"model": hf, "mcore_model": folder / "mcore"}


@pytest.mark.parametrize(
    "given",
    [
        {"to_mcore": True, "model": ""},
        {"to_hf": True, "mcore_model": ""},
        {"to_hf": True, "model": "", "torch_dtype": "float16"},
        {"to_hf": True, "model": "", "max_shard_size": "1GB"},
    ],
)
def test_what_is_used_changes_the_plan(given: dict[str, Any], folders: dict[str, Path]) -> None:
    given = {name: folders.get(name, value) for name, value in given.items()}
    plain = make_plan(ConversionRequest(**given)).digest
    of_mcore = ("torch_dtype", "layer_keys")
    of_hf = ("torch_dtype", "max_shard_size", "expert_layout", "fp8_quantise")
    for name in of_mcore if "to_mcore" in given else of_hf:
        assert make_plan(ConversionRequest(**{**given, name: VALUES[name]})).digest != plain, name


def test_choices_are_checked_by_functions_too(folders: dict[str, Path]) -> None:
    with pytest.raises(ConversionError, match="expert_layout=stacked must be per_expert or fused"):
        make_plan(ConversionRequest(to_hf=True, mcore_model=folders["mcore_model"], expert_layout="stacked"))  # type: ignore[arg-type]
