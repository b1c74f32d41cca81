"""Data: where samples come from, how they become tokens, and in which order they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Datasets, templates, lengths, packing, shuffling and the workers that prepare batches."""

    dataset: Sequence[str] = param(())
    """Training data: files (JSONL, JSON, CSV, TSV, Parquet, also .gz and .zst), folders or hub names; `path#500` draws
    500 samples."""
    val_dataset: Sequence[str] = param(())
    """Validation data, in the form of `dataset`; if given, nothing is split off the training data."""
    interleave_prob: Sequence[float] | None = param(None)
    """Draws rows from the datasets at random, with these probabilities, one for each dataset, instead of taking all of
    them; validation data is not mixed."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = param("first_exhausted")
    """When drawing with `interleave_prob` ends: with the first dataset that has no further row, or with the last one,
    while the others begin again."""
    split_dataset_ratio: float = param(0.0, at_least=0, below=1)
    """Fraction of the training data used for validation if `val_dataset` is empty; rows that `preprocess` made of
    one row stay together."""
    columns: Mapping[str, str] | None = param(None)
    """Renames columns: name in the file → name that megabatch reads, for example `{"question": "query"}`."""
    preprocess: str | None = param(None)
    """Your own function that turns each row of a file into a row, a list of rows or None (dropped), as
    `file.py:function`; it sees the file's columns, before `columns` renames them."""
    preprocess_timeout_s: float = param(60.0, speed_only=True, above=0)
    """Seconds that `preprocess` may take for one row."""
    template: Literal["chatml", "plain"] | None = param(None)
    """Chat template; None uses the tokenizer's own."""
    system: str | None = param(None)
    """System message of samples without their own; None leaves it to the template."""
    enable_thinking: bool | None = param(None)
    """Whether the chat template of a model that can think has it do so, in prompts that are answered while training
    too; None leaves it to the template. The same as that variable in `chat_template_kwargs`."""
    chat_template_kwargs: Mapping[str, Any] | None = param(None)
    """Variables for the chat template, which must read them; on the command line as a JSON object. A row's own column
    of that name takes precedence."""
    sanitize_control_tokens: bool = param(True)
    """Tokenizes control tokens in the data (`<|im_end|>`) as plain text, so that only the template can write them.
    False lets the data write them too."""
    loss_scale: str | None = param(None)
    """Which tokens to train on, and how much: every assistant turn (`default`), those after the last user message
    (`last_round`) or all tokens (`all`); behind it, with `+`, weights of parts of the turns (`ignore_empty_think`,
    `hermes`, `react`, …): `last_round+ignore_empty_think`.

    None means `all` for pt, `default` for sft and `last_round` for rlhf.
    """

    max_length: int | None = param(None, at_least=2)
    """Longest sample in tokens; `truncation_strategy` decides about longer ones. None uses the model's largest
    position."""
    seq_length: int | None = param(None, at_least=2)
    """Has no effect: rows are as long as their samples. Must be None or equal to `max_length`."""
    truncation_strategy: Literal["delete", "left", "right", "split", "raise"] | None = param(None)
    """What happens to a sample longer than `max_length`: dropped, cut at that end, split into pieces (pt only), or an
    error. None means `delete`, for GRPO `left`."""
    packing: bool = param(False)
    """Packs whole samples into rows of about `packing_length` tokens; samples of a row do not see each other."""
    packing_length: int | None = param(None, at_least=2)
    """Tokens of a packed row; None means `max_length`."""
    packing_num_proc: int = param(1, speed_only=True, at_least=1)
    """Has no effect: packs are made in one pass over the lengths, in one process."""
    pad_to_max_length: bool = param(False)
    """Pads every row to `micro_batch_size` times `packing_length`, or `max_length` without packing.

    Pipeline stages then need not exchange shapes. Padding costs time but is excluded from loss, gradient and routing.
    """
    padding_free: bool = param(True)
    """Lays the samples of a micro-batch end to end instead of padding them to the longest of them. False costs time
    and changes no number: padding is excluded from loss, gradient and routing."""
    mlp_padding_free: bool = param(False, speed_only=True)
    """Has no effect: only `padding_free=False` makes padding, and every layer computes it."""

    dataset_shuffle: bool = param(True)
    """Shuffles the dataset once, from the seed, before it is split and packed."""
    train_dataloader_shuffle: bool = param(True)
    """Draws the training rows in a different order in each epoch, from the seed."""
    no_data_sharding: bool = param(False, speed_only=True, negated_aliases=("data_sharding",))
    """Has no effect: rows are always shuffled over the whole dataset, so that their order does not depend on the
    layout."""
    group_by_length: bool = param(False)
    """Draws samples of similar length together: the epoch's order is sorted by length, 50 batches at a time. The order
    then depends on `global_batch_size`, so a run resumes with the same one only."""
    dataloader_type: Literal["single", "cyclic", "external"] = param("cyclic")
    """Order of rows: `single` for one pass without shuffling by epoch (in file order with `dataset_shuffle=False`),
    `cyclic` for epochs, each in its own order, `external` for a stream."""
    streaming: bool = param(False)
    """Reads, tokenizes and packs data while training instead of before, without a cache; needs `train_iters`. Rows are
    shuffled and packed within blocks of `shuffle_buffer_size`."""
    shuffle_buffer_size: int = param(1000, at_least=1)
    """Rows that a stream shuffles and packs together, rounded up to a multiple of 128."""
    lazy_tokenize: bool | None = param(None, speed_only=True)
    """Has no effect: samples are tokenized once, into a cache, before the first step."""
    dataset_num_proc: int = param(1, speed_only=True, at_least=1)
    """Processes that read and tokenize the datasets."""
    load_from_cache_file: bool = param(False, speed_only=True)
    """Reuses tokenized data of an earlier run from the cache."""
    num_workers: int = param(4, speed_only=True, aliases=("dataloader_num_workers",), at_least=0)
    """Threads per rank that prepare batches ahead; 0 prepares each batch when it is needed."""
    dataloader_pin_memory: bool = param(True, speed_only=True)
    """Prepares batches in page-locked memory, for faster copies to a GPU."""
    dataloader_persistent_workers: bool = param(True, speed_only=True)
    """Keeps the workers alive between epochs; threads always stay alive."""
    dataloader_prefetch_factor: int = param(2, speed_only=True, at_least=1)
    """Steps that each worker prepares ahead."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    @property
    def template_variables(self) -> Mapping[str, Any]:
        """What every row's chat template is given."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**(self.chat_template_kwargs or {}), **thinking}
