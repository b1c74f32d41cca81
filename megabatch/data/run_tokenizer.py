"""Where a run's tokenizer comes from: a folder, a hub, or the training data itself. Without torch."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.converters.atomic import replacing
from megabatch.converters.auxiliary_files import carry_over, carry_tokenizer, tokenizer_files
from megabatch.converters.families import family_named
from megabatch.converters.families.config_json import with_vocabulary
from megabatch.converters.hf_model import read_config
from megabatch.data.rows import sources
from megabatch.data.rows.hub import log_through_ours
from megabatch.data.rows.kinds import READERS
from megabatch.data.rows.preprocess import preprocess_of
from megabatch.data.tokens import new_tokens
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.errors import ConfigError, DataError, MegabatchError

NEW_MODEL = "model"
"""Folder in the run directory with config.json and tokenizer of a new model, or of one that gets new tokens or another
model's tokenizer."""
logger = logging.getLogger(__name__)


def tokenizer_of(run: RunConfig) -> Path:
    """Folder of the run's tokenizer; downloads, trains or extends it if necessary. Raises: ConfigError, DataError."""
    model = run.recipe.model
    if model.model is None:
        return new_model(run)
    tokenizer = folder_of(resolved(model.tokenizer), run)
    tokenizers.check(tokenizer)
    config_folder = folder_of(model.model, run)
    if model.new_special_tokens:
        return extended(tokenizer, run, config_folder=config_folder)
    if tokenizers.class_keys(tokenizer) == tokenizers.class_keys(config_folder):
        return tokenizer
    return _beside(tokenizers.class_keys(config_folder), tokenizer, Path(run.run_dir) / NEW_MODEL)


def _beside(keys: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
    """`folder` with a copy of a tokenizer beside such keys of config.json, so that it splits text as in the exports.

    transformers chooses a tokenizer's class by the `model_type` beside it: Qwen2's splits numbers into digits,
    whatever tokenizer.json says.
    """
    _write_keys(keys, folder)
    carry_tokenizer(tokenizer, folder)
    here, alone = (type(tokenizers.load(one)).__name__ for one in (folder, tokenizer))
    if here != alone:
        logger.warning(
            "model.tokenizer: transformers reads %s as %s beside a model of type %s, and alone as %s, which may split "
            "text otherwise; the run trains with the former, as its exports will be read",
            tokenizer,
            here,
            keys.get("model_type"),
            alone,
        )
    return folder


def _write_keys(keys: dict[str, Any], folder: Path) -> None:
    """Leaves a config.json that has them already."""
    if tokenizers.class_keys(folder) != keys:
        _write_config_json(keys, folder)


def _write_config_json(config: dict[str, Any], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "config.json") as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
    except OSError as e:
        raise MegabatchError(f"{folder} cannot be written: {e.strerror or e}") from e


def extended(tokenizer: Path, run: RunConfig, *, config_folder: Path | None = None) -> Path:
    """A copy of a tokenizer in the run directory with the run's new tokens; with `config_folder` also its config.json,
    for the run's vocabulary, and its other auxiliary files.

    Raises: DataError where a token is there already, or gets another id than the run was planned with.
    """
    tokens, target = run.recipe.model.new_special_tokens, Path(run.run_dir) / NEW_MODEL
    rows = new_tokens.rows_with(tokenizer, tokens)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if config_folder is not None:
            carry_over(config_folder, target, skip=("config.json", *tokenizer_files(config_folder)))
            _write_config_json(with_vocabulary(read_config(config_folder), run.shape.vocab_size), target)
        # whoever reads the folder of a run that is resumed or replayed never sees the tokenizer without the new tokens
        carry_tokenizer(tokenizer, target, skip=new_tokens.WRITTEN)
        new_tokens.write_with(tokenizer, tokens, target)
    except OSError as e:
        raise MegabatchError(f"{target} cannot be written: {e.strerror or e}") from e
    ids = tokenizers.load(target).convert_tokens_to_ids(list(tokens))
    if ids != list(range(rows - len(tokens), rows)):
        raise DataError(
            f"model.new_special_tokens: transformers gives {tokens[0]!r} in {target} the id {ids[0]}, and the run was "
            f"planned with {rows - len(tokens)}; add the tokens with transformers, and train from that folder"
        )
    return target


def new_model(run: RunConfig) -> Path:
    """Folder with config.json and tokenizer of a model without weights; creates them if necessary."""
    folder = Path(run.run_dir) / NEW_MODEL
    if (given := run.recipe.model.tokenizer) is None:
        _train_tokenizer(run, folder)
    elif run.recipe.model.new_special_tokens:
        extended(folder_of(given, run), run)
    else:
        tokenizers.check(tokenizer := folder_of(given, run))
        _beside({"model_type": run.shape.model_type}, tokenizer, folder)
    _write_config(run, folder)
    return folder


def folder_of(name: str, run: RunConfig, *, revision: str | None = None) -> Path:
    """The local folder of this name, or a download from a hub. Args: revision: on the hub; None: its newest."""
    if Path(name).is_dir():
        return Path(name)
    bridge = run.recipe.bridge
    token = os.environ.get(bridge.hub_token) if bridge.hub_token else None
    try:
        if bridge.use_hf:
            from huggingface_hub import snapshot_download as hf_download

            log_through_ours()
            return Path(hf_download(name, token=token, revision=revision))
        from modelscope import snapshot_download as ms_download

        return Path(ms_download(name, token=token, revision=revision))
    except ImportError as e:
        raise ConfigError(
            f"model.model={name!r} is not a local folder, and bridge.use_hf=False selects ModelScope's hub, whose "
            "package is not installed; pip install modelscope, or set use_hf=True for Hugging Face's hub"
        ) from e
    except Exception as e:  # hub clients raise a dozen types, and all mean that the download failed
        raise ConfigError(
            f"model.model={name!r} is not a local folder and cannot be downloaded ({type(e).__name__}: "
            f"{str(e).strip().splitlines()[0]}); download it on a machine with network access and give its folder"
        ) from e


def _train_tokenizer(run: RunConfig, folder: Path) -> None:
    """A byte-level BPE trained on the training data; kept, so that later attempts use the same one."""
    if (folder / "tokenizer_config.json").is_file():
        return
    data = run.recipe.data
    preprocess = preprocess_of(data) or (lambda row: [row])
    texts = [
        message.content
        for source in sources.resolve(data.dataset, use_hf=run.recipe.bridge.use_hf)
        for read in source.rows(seed=run.recipe.training.seed, shuffle=data.dataset_shuffle)
        for row in preprocess(read)
        for conversation in READERS[run.task.rows](row, columns=data.columns, system=data.system)
        for message in conversation.messages
    ]
    further = run.recipe.model.new_special_tokens
    tokenizers.train_bpe(texts, vocab_size=run.shape.vocab_size, out_dir=folder, further=further)


def _write_config(run: RunConfig, folder: Path) -> None:
    """Of a new model, into the folder with its tokenizer."""
    _write_keys({"model_type": run.shape.model_type}, folder)
    loaded: Any = tokenizers.load(folder)
    if len(loaded) > run.shape.vocab_size:
        raise DataError(
            f"model.tokenizer: {folder} has {len(loaded)} tokens, above model.padded_vocab_size="
            f"{run.shape.vocab_size}; try {len(loaded)} or more"
        )
    tokens = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    family = family_named(run.shape.model_type)
    config = family.hf_config(run.shape, dtype=resolved(run.recipe.model.torch_dtype), **tokens)
    _write_config_json(config, folder)
