"""The flags of `megabatch-convert`: declared once, read, and shown by `--help`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from megabatch.errors import ConversionError

_YES = ("true", "1", "yes", "on")
_NO = ("false", "0", "no", "off")


def _flag(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """The command line's values."""

    to_mcore: bool = _flag(False, "Hugging Face's format to megatron-core's")
    to_hf: bool = _flag(False, "megatron-core's format to Hugging Face's")
    model: str = _flag("", "Hugging Face folder or downloaded org/name: the source, or --to_hf takes its config")
    mcore_model: str = _flag("", "checkpoint for --to_hf: of a run, a step, or of Megatron-LM or ms-swift")
    adapters: tuple[str, ...] = _flag((), "LoRA adapters, PEFT's or megatron-core's: one to convert, or some to merge")
    merge_lora: bool = _flag(False, "add the adapters to the weights, in their order")
    peft_format: str = _flag("", "per_expert or fused (as transformers 5 has them): experts' adapters for --to_hf")
    output_dir: str = _flag("", "folder to make")
    torch_dtype: str = _flag("", "bfloat16, float16 or float32; left as they are by default")
    max_shard_size: str = _flag("", "largest safetensors file, 5GB by default; with --model alone, only that changes")
    expert_layout: str = _flag("", "per_expert or fused (as transformers 5 has them): experts of the folder written")
    fp8_quantise: bool = _flag(False, "write the weights of linear layers in block-scaled FP8, as DeepSeek-V3's")
    layer_keys: str = _flag("", "per_layer where a run's --moe-layer-freq is a list, else stacked: for --to_mcore")
    accept_bin: bool = _flag(False, "read pickled weights where there are no safetensors; no code in them is run")
    exist_ok: bool = _flag(False, "replace an output that exists, once the new one is complete")
    workers: int = _flag(0, "threads; by default as many as processors, at most 8")
    resume: bool = _flag(False, "finish what an interrupted conversion left")
    verify: bool = _flag(
        False, "compare every byte with its source, and write digests; alone: check an output by them"
    )
    dry_run: bool = _flag(False, "show every tensor, its bytes and the disk needed, and write nothing")
    test_convert_precision: bool = _flag(False, "compare the logits of transformers and of the trainer's model")
    test_convert_dtype: str = _flag("float32", "dtype that both compute in")
    rank: int = _flag(-1, "this process among --world that share the work; by default from srun")
    world: int = _flag(0, "how many processes share the work; by default from srun")
    help: bool = _flag(False, "these lines")


def parse(arguments: Sequence[str]) -> Flags:
    """The values given. Raises: ConversionError with every fault of the command line."""
    known = {flag.name: flag for flag in fields(Flags)}
    given: dict[str, Any] = {}
    faults: list[str] = []
    for name, texts in _split(arguments, faults):
        flag = known.get("help" if name in ("h", "help") else name)
        if flag is None:
            near = get_close_matches(name, known, n=1)
            faults.append(f"--{name} is not a flag" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
        elif flag.name in given:
            faults.append(f"--{flag.name} is given twice")
        else:
            given[flag.name] = _value(flag, texts, faults)
    if faults:
        raise ConversionError("\n  ".join(["the command line has faults, nothing was done", *faults]))
    return Flags(**given)


def changed(flags: Flags) -> list[str]:
    """Names of the flags whose values are not the defaults."""
    return [flag.name for flag in fields(Flags) if getattr(flags, flag.name) != flag.default]


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
            faults.append(f"{argument!r} is no flag; flags begin with --")
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
    if kind is str:
        return text
    faults.append(f"--{flag.name} {text} must be {'true or false' if kind is bool else 'a whole number'}")
    return flag.default


def help_text() -> str:
    """What `--help` prints."""
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
    for flag in fields(Flags):
        default = "" if flag.default in (False, "", 0, -1, (), MISSING) else f" (default: {flag.default})"
        lines.append(f"  --{flag.name:24}{flag.metadata['help']}{default}")
    lines += ["", "Switches are accepted bare and with a value: --to_hf, --to_hf true, --to_hf=false."]
    return "\n".join(lines)
