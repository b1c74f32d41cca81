"""Where a run's tokenizer comes from: a folder, a hub, or the training data itself. Without torch."""

from __future__ import annotations

import json
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
"""Folder in the run directory with config.json and tokenizer of a new model, or of one that gets new tokens."""


def tokenizer_of(run: RunConfig) -> Path:
    """Folder of the run's tokenizer; downloads, trains or extends it if necessary. Raises: ConfigError, DataError."""
    model = run.recipe.model
    if model.model is None:
        return new_model(run)[1]
    tokenizer = folder_of(resolved(model.tokenizer), run)
    tokenizers.check(tokenizer)
    if model.new_special_tokens:
        return extended(tokenizer, run, config_folder=folder_of(model.model, run))
    return tokenizer


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
            config = with_vocabulary(read_config(config_folder), run.shape.vocab_size)
            with replacing(target / "config.json") as file:
                file.write((json.dumps(config, indent=2) + "\n").encode())
        carry_tokenizer(tokenizer, target)
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


def new_model(run: RunConfig) -> tuple[Path, Path]:
    """(folder with config.json, folder of the tokenizer) for a model without weights; creates them if necessary."""
    folder = Path(run.run_dir) / NEW_MODEL
    given = run.recipe.model.tokenizer
    tokenizer = folder_of(given, run) if given else _trained_tokenizer(run, folder)
    if given and run.recipe.model.new_special_tokens:
        tokenizer = extended(tokenizer, run)
    _write_config(run, folder, tokenizer)
    return folder, tokenizer


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


def _trained_tokenizer(run: RunConfig, folder: Path) -> Path:
    """A byte-level BPE trained on the training data; kept, so that later attempts use the same one."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
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
    return tokenizers.train_bpe(texts, vocab_size=run.shape.vocab_size, out_dir=folder, further=further)


def _write_config(run: RunConfig, folder: Path, tokenizer: Path) -> None:
    loaded: Any = tokenizers.load(tokenizer)
    if len(loaded) > run.shape.vocab_size:
        raise DataError(
            f"model.tokenizer: {tokenizer} has {len(loaded)} tokens, above model.padded_vocab_size="
            f"{run.shape.vocab_size}; try {len(loaded)} or more"
        )
    tokens = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    family = family_named(run.shape.model_type)
    config = family.hf_config(run.shape, dtype=resolved(run.recipe.model.torch_dtype), **tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "config.json") as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
        if tokenizer != folder:
            loaded.save_pretrained(folder)
    except OSError as e:
        raise MegabatchError(f"{folder} cannot be written: {e.strerror or e}") from e
