"""Tokenizers: loaded from a folder, or a small byte-level BPE trained on the data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megabatch.data.tokens.auto_tokenizer import auto_tokenizer
from megabatch.data.tokens.default_templates import CHATML
from megabatch.errors import DataError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Any one of these sets makes a tokenizer.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))

_CLASS_KEYS = ("model_type", "model_name", "tokenizer_class", "auto_map")
"""Keys of config.json that transformers' AutoTokenizer reads; models that share a tokenizer differ in the others."""


def load(folder: Path | str) -> Any:
    """The Hugging Face tokenizer of a local folder.

    Raises: DataError naming the missing files, or the reason why transformers cannot read them.
    """
    check(folder)
    try:
        tokenizer = auto_tokenizer().from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers and its Rust part raise bare Exceptions for malformed files
        reason = (str(e).strip().splitlines() or [""])[0]
        raise DataError(
            f"model.tokenizer: {folder} cannot be read ({type(e).__name__}: {reason}); download its tokenizer.json "
            f"and tokenizer_config.json again"
        ) from e
    if not tokenizer.is_fast:
        raise DataError(
            f"model.tokenizer: {folder} holds a slow tokenizer without character offsets, which loss masks need; "
            f"convert it to tokenizer.json with transformers' fast class"
        )
    return tokenizer


def rows(folder: Path | str) -> int:
    """Rows of an embedding that has one for each id of a tokenizer. Raises: DataError as `load`."""
    return 1 + max(load(folder).get_vocab().values())


def check(folder: Path | str) -> None:
    """Raises DataError unless the folder holds a tokenizer's files; reads none of them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"model.tokenizer: there is no folder {folder}; give one with tokenizer.json")
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        wanted = ", or ".join(" and ".join(names) for names in _VOCABULARIES)
        raise DataError(f"model.tokenizer: {folder} has no tokenizer; it must hold {wanted}")


def check_readable(folder: Path | str) -> None:
    """Raises DataError when a file of the tokenizer is truncated or only a Git LFS pointer."""
    for path in (Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")):
        try:
            if path.is_file():
                json.loads(path.read_bytes())
        except (OSError, ValueError) as e:
            raise DataError(f"model.tokenizer: {path} is not valid JSON ({e}); download it again") from e


def class_keys(folder: Path | str) -> dict[str, Any]:
    """The keys of a folder's config.json that decide, with the tokenizer's own files, how transformers splits text.

    Raises: DataError for a file that is no JSON.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise DataError(f"model.tokenizer: {path} is not valid JSON ({e}); download it again") from e
    return {key: config[key] for key in _CLASS_KEYS if key in config} if isinstance(config, dict) else {}


def template_texts(folder: Path | str) -> list[str]:
    """All chat templates among a tokenizer's files, as text, wherever transformers looks for them."""
    files = [*Path(folder).glob("chat_template.*"), *Path(folder).glob("additional_chat_templates/*")]
    found = [path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()]
    config = Path(folder) / "tokenizer_config.json"
    if config.is_file() and (own := json.loads(config.read_bytes()).get("chat_template")):
        found.append(own if isinstance(own, str) else json.dumps(own))
    return found


NO_ENTRY = "is no entry of the tokenizer's vocabulary; name one as tokenizer.json spells it"


def entry(tokenizer: Any, token: str, *, field: str) -> int:
    """The id of an entry of the vocabulary. Args: field: the parameter that names it. Raises: DataError."""
    index = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(index, int) or tokenizer.convert_ids_to_tokens(index) != token:
        raise DataError(f"{field}={token!r} {NO_ENTRY}")
    return index


def ids(folder: Path | str) -> dict[str, int] | None:
    """The id of each entry of the vocabulary, read without any package; None where tokenizer.json is missing."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_bytes())
    vocabulary = (found.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {one if isinstance(one, str) else one[0]: number for number, one in enumerate(vocabulary)}
    return {**vocabulary, **{one["content"]: one["id"] for one in found.get("added_tokens") or ()}}


def difference(one: Path | str, other: Path | str) -> str | None:
    """How two tokenizers differ, if most of the ids that both have stand for other tokens; also None where a
    tokenizer.json is missing."""
    found, wanted = ids(one), ids(other)
    if found is None or wanted is None:
        return None
    mine, its = ({number: token for token, number in some.items()} for some in (found, wanted))
    shared = sorted(mine.keys() & its.keys())
    apart = [number for number in shared if mine[number] != its[number]]
    if 2 * len(apart) <= len(shared):
        return None
    first = apart[0]
    return (
        f"{len(apart):,} of the {len(shared):,} ids that both have stand for other tokens (id {first} for "
        f"{mine[first]!r} and {its[first]!r})"
    )


def backend(tokenizer: Any) -> Any:
    """The Rust tokenizer, without the truncation and padding that its file may ask for."""
    tokenizer("", add_special_tokens=False)  # resets both, and how special tokens are read
    return tokenizer.backend_tokenizer


def train_bpe(texts: Iterable[str], *, vocab_size: int, out_dir: Path | str, further: Sequence[str] = ()) -> Path:
    """Trains a byte-level BPE with ChatML tokens and saves it so that transformers' AutoTokenizer loads it.

    The same texts give the same files. The vocabulary may come out smaller than `vocab_size` when the texts hold
    fewer merges.

    Args: `vocab_size` includes 256 bytes and three special tokens; `further`: special tokens besides those.
    Returns: `out_dir`.   Raises: DataError for a vocabulary too small or no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [*SPECIAL_TOKENS, *further]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise DataError(f"vocab_size={vocab_size} is below the 256 bytes and special tokens; try {smallest} or more")
    texts = list(texts)
    if not any(texts):
        raise DataError("a tokenizer needs text to train on; give at least one non-empty document")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_turn,
        "pad_token": end_of_text,
        "additional_special_tokens": ["<|im_start|>", *further],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
        "chat_template": CHATML,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out_dir
