"""The flags of `megabatch-convert`: the fields of a `ConversionRequest` and a few more, read, written and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field, field, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any

from megabatch.converters.request import ConversionRequest, choices
from megabatch.errors import ConversionError
from megabatch.values import dataclass

_YES = ("true", "1", "yes", "on")
_NO = ("false", "0", "no", "off")


def _flag(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """The command line's values: what to convert, and how."""

    request: ConversionRequest = field(default_factory=ConversionRequest)
    output_dir: str = _flag("", "folder to make")
    exist_ok: bool = _flag(False, "replace an existing output once the new one is complete")
    workers: int = _flag(0, "number of threads; default: one per processor, at most 8")
    resume: bool = _flag(False, "finish an interrupted conversion")
    verify: bool = _flag(
        False, "compare every byte with its source and write digests; alone: check an output against its digests"
    )
    dry_run: bool = _flag(False, "print every tensor, its bytes and the disk space needed, and write nothing")
    test_convert_precision: bool = _flag(False, "compare the logits of transformers and of the trainer's model")
    test_convert_dtype: str = _flag("float32", "dtype for both models")
    rank: int = _flag(-1, "number of this process among --world; default: from srun")
    world: int = _flag(0, "number of processes that share the work; default: from srun")
    help: bool = _flag(False, "these lines")


_OF_REQUEST = {argument.name: argument for argument in fields(ConversionRequest)}
FLAGS = _OF_REQUEST | {flag.name: flag for flag in fields(Flags) if flag.name != "request"}
"""Every flag by its name."""


def _unknown(name: str) -> str:
    """What is wrong with a name that is no flag."""
    if name.endswith("parallel_size"):
        return "has no effect: a checkpoint has no layout, and runs of any layout load it"
    near = get_close_matches(name, FLAGS, n=1)
    return "is not a flag; " + (f"did you mean --{near[0]}?" if near else "see --help")


def parse(arguments: Sequence[str]) -> Flags:
    """The values given. Raises: ConversionError with every fault of the command line."""
    given: dict[str, Any] = {}
    faults: list[str] = []
    for name, texts in _split(arguments, faults):
        flag = FLAGS.get("help" if name in ("h", "help") else name)
        if flag is None:
            faults.append(f"--{name} {_unknown(name)}")
        elif flag.name in given:
            faults.append(f"--{flag.name} is given twice")
        else:
            given[flag.name] = _value(flag, texts, faults)
    if faults:
        raise ConversionError("\n  ".join(["the command line has faults; nothing was done", *faults]))
    request = {name: given.pop(name) for name in _OF_REQUEST if name in given}
    return Flags(request=ConversionRequest(**request), **given)


def changed(flags: Flags) -> dict[str, Any]:
    """The flags whose values are not the defaults."""
    values = {name: getattr(flags.request if name in _OF_REQUEST else flags, name) for name in FLAGS}
    return {name: value for name, value in values.items() if value != FLAGS[name].default}


def command_line(flags: Flags) -> list[str]:
    """The arguments that `parse` reads as these values."""
    words: list[str] = []
    for name, value in changed(flags).items():
        texts = value if isinstance(value, list | tuple) else () if value is True else (value,)
        words += [f"--{name}", *map(str, texts)]
    return words


def _split(arguments: Sequence[str], faults: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the texts behind it; hyphens in names are read as underscores."""
    name, texts = None, []
    for argument in [*arguments, "--"]:
        if argument.startswith("--") or argument == "-h":
            if name is not None:
                yield name, texts
            spelled, equals, value = argument.lstrip("-").partition("=")
            name, texts = spelled.replace("-", "_"), [value] if equals else []
        elif name is None:
            faults.append(f"{argument!r} is not a flag; flags begin with --")
        else:
            texts.append(argument)


def _value(flag: Field[Any], texts: list[str], faults: list[str]) -> Any:
    kind = type(flag.default)
    if kind is tuple and texts and all(texts):
        return tuple(texts)
    if kind is bool and not texts:
        return True
    if len(texts) != 1 or not texts[0]:
        faults.append(f"--{flag.name} needs one value" + (f", not {' '.join(texts)!r}" if texts else ""))
        return flag.default
    text = texts[0]
    if kind is bool and text.lower() in (*_YES, *_NO):
        return text.lower() in _YES
    if kind is int and text.isdecimal():
        return int(text)
    if kind in (str, NoneType):
        return text
    faults.append(f"--{flag.name} {text} must be {'true or false' if kind is bool else 'a whole number'}")
    return flag.default


def help_text() -> str:
    """The text that `--help` prints."""
    lines = [
        "usage: megabatch-convert --to_mcore --model HF_FOLDER --output_dir OUT",
        "       megabatch-convert --to_hf --mcore_model CHECKPOINT [--model HF_FOLDER] --output_dir OUT",
        "       megabatch-convert --to_mcore|--to_hf --adapters ADAPTER [--model HF_FOLDER] --output_dir OUT",
        "       megabatch-convert --merge_lora --adapters ADAPTER ... --to_mcore|--to_hf --model HF_FOLDER ...",
        "       megabatch-convert --to_hf --model HF_FOLDER --fp8_quantise|--expert_layout|--torch_dtype ...",
        "       megabatch-convert --to_hf --model HF_FOLDER --max_shard_size SIZE --output_dir OUT",
        "       megabatch-convert --verify --output_dir OUT",
        "",
    ]
    of = choices()
    for name, flag in FLAGS.items():
        words = f"{' or '.join(of[name])}: " if name in of else ""
        default = "" if flag.default in (None, False, "", 0, -1, ()) else f" (default: {flag.default})"
        lines.append(f"  --{name:24}{words}{flag.metadata['help']}{default}")
    lines += ["", "Switches work with and without a value: --to_hf, --to_hf true, --to_hf=false."]
    return "\n".join(lines)
