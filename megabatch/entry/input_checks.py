"""Checks of inputs on this machine before a run is queued: files that are missing, empty, damaged or in the way."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megabatch.config.grpo_defaults import filled
from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.data.rows import files, names
from megabatch.data.rows.compressed import inner_suffix
from megabatch.data.rows.files import Origin
from megabatch.data.rows.prompts import ColumnNames
from megabatch.data.tokens import tokenizer
from megabatch.data.tokens.default_templates import OWN_TEMPLATES
from megabatch.entry.model import FoundModel, fault_of, find_shape, nearest_folder
from megabatch.entry.other_models import damaged_other_models, other_model_faults
from megabatch.entry.paths import NUMBERED
from megabatch.entry.row_checks import Check, row_check
from megabatch.entry.steps_left import not_to_go_on
from megabatch.errors import CheckpointError, ConfigError, DataError, Fault, MegabatchError
from megabatch.hub_cache import download_command, is_hub_name
from megabatch.plan.shape import ModelShape
from megabatch.run_directory import RunDirectory
from megabatch.saved.find import FoundCheckpoint, find_to_load
from megabatch.saved.history import HF

SCANNED_BYTES = 64 << 20
"""We read JSONL, JSON, CSV and TSV files up to this size before submission; that takes about a second."""
_RUN_FILES = {"run.json", "sweep.json", "chain.json"}
_BEFORE = {"code", "logs", "slurm", "job.sbatch"}
"""Files that a refused submission leaves in a folder that existed before."""
_SCANNED_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_GZIP_RATIO = 8
"""Text is about this many times larger than its .gz."""


def missing_inputs(recipe: Recipe, model: FoundModel, *, shared_cache: str | None = None) -> list[Fault]:
    """Faults of the run's inputs that names and sizes show; reads no data. Args: shared_cache: the profile's."""
    found = _tokenizer(recipe, model, tokenizer.check)
    others = [*_tuning(recipe, model), *other_model_faults(recipe, model.shape, shared_cache=shared_cache)]
    loaded = _load(recipe, model.shape)
    return [*_datasets(recipe, _check_presence), *_model(recipe, model), *found, *loaded, *others]


def _tuning(recipe: Recipe, model: FoundModel) -> list[Fault]:
    beside = recipe.bridge.ref_adapters or recipe.rlhf.ref_adapter_load
    if not (recipe.tuner.trains_part or beside) or model.fault is not None:
        return []
    from megabatch.entry.tuning import tuning_faults  # the converters' tables; most recipes train everything

    return list(tuning_faults(recipe, model.shape))


def damaged_inputs(
    recipe: Recipe,
    model: FoundModel,
    *,
    trains: bool = True,
    has_all_data: bool = True,
    shared_cache: str | None = None,
) -> list[Fault]:
    """Faults inside the inputs: malformed rows, too few rows, and weights that do not fit their config.json.

    Args: trains: False for an evaluation, which takes whatever rows there are; has_all_data: False where another run
    has yet to make some of the datasets; shared_cache: the profile's.
    """
    counts: dict[str, int | None] = {}
    kinds: dict[int, Origin] = {}
    columns = ColumnNames()
    check = row_check(recipe, kinds=kinds, names=columns)

    def count(name: names.DatasetName) -> None:
        counts[name.text] = _rows(check, name)

    rows = list(_datasets(recipe, count, fields=("dataset",)))
    known = [counts.get(text) for text in recipe.data.dataset]
    if trains:
        rows = rows or _too_few(recipe, known) + _one_kind(recipe, kinds)
    rows += _datasets(recipe, count, fields=("val_dataset",))
    if (
        not rows
        and has_all_data
        and all(_was_read(recipe, text) for text in (*recipe.data.dataset, *recipe.data.val_dataset))
    ):
        rows += _rewards_without_columns(recipe, columns.found)
    readable = list(_tokenizer(recipe, model, tokenizer.check_readable))
    readable = readable or [*_answers(recipe, model), *_template_variables(recipe, model)]
    return [
        *rows,
        *readable,
        *_weights(recipe, model),
        *damaged_other_models(recipe, tokenizer=_tokenizer_folder(recipe, model), shared_cache=shared_cache),
    ]


def unwritable(run_directory: Path) -> list[Fault]:
    """The fault, if the run directory cannot be made, or what a run writes in it cannot be written."""
    run = RunDirectory(run_directory)
    # not Path.exists, which raises below a folder that we may not read
    existing = next(path for path in (run_directory, *run_directory.parents) if os.path.exists(path))
    for folder in (existing, *(path for path in (run.checkpoints, run.logs) if os.path.exists(path))):
        is_folder = os.path.isdir(folder)
        if not (is_folder and os.access(folder, os.W_OK | os.X_OK)):
            problem = "is not writable for you" if is_folder else "is a file"
            rule = f"cannot be written: {folder} {problem}; choose another folder with --save or --run_dir"
            return [Fault("run directory", str(run_directory), rule)]
    return []


def in_the_way(run_directory: Path) -> list[Fault]:
    """The fault, if a file stands where the run directory or a folder above it is to be: no machine can make it."""
    return unwritable(run_directory) if any(map(os.path.isfile, (run_directory, *run_directory.parents))) else []


def occupied(run_directory: Path, *, own: Collection[str] = ()) -> list[Fault]:
    """The fault, if other files occupy the folder of a new run, sweep or chain; hidden files do not count.

    Args: `own` are further names that it makes there itself.
    """
    try:
        names = set(os.listdir(run_directory))
    except OSError:
        return []  # missing, or `unwritable` reports the fault
    if names & _RUN_FILES:
        return []  # `written` checks whether it is this same run
    others = sorted(n for n in names - _BEFORE - {*own} if not n.startswith(".") and not NUMBERED.fullmatch(n))
    if not others:
        return []
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    rule = f"holds no run, but {', '.join(others[:3])}{more}; choose an empty or a new folder with --run_dir"
    return [Fault("run directory", str(run_directory), rule)]


def missing_gpus(recipe: Recipe) -> list[Fault]:
    """Compares this machine's GPUs with the ranks of a local run; counts device files, without torch."""
    wanted, found = recipe.resources.world_size, len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not recipe.resources.gpus_per_node or wanted <= found or Path("/dev/dxg").exists():  # WSL does not list them
        return []
    rule = f"needs {wanted} GPUs with --local, and this machine has {found}"
    fix = ("--submit", "--gpus_per_node 0 --distributed_backend gloo for CPUs")
    return [Fault("resources.gpus_per_node", recipe.resources.gpus_per_node, rule, try_=fix)]


def _datasets(
    recipe: Recipe,
    check: Callable[[names.DatasetName], None],
    *,
    fields: Sequence[str] = ("dataset", "val_dataset"),
) -> Iterator[Fault]:
    for field in fields:
        for text in getattr(recipe.data, field):
            try:
                check(names.parse(text, use_hf=recipe.bridge.use_hf))
            except DataError as error:
                yield fault_of(f"data.{field}", error)


def _check_presence(name: names.DatasetName) -> None:
    if name.kind != "path":
        return
    for path in names.local_files(name):
        try:
            with open(path, "rb") as file:
                empty = not file.read(1)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        if empty:
            raise DataError(f"{path} is empty; give a file with at least one example")


def _rows(check: Check, name: names.DatasetName) -> int | None:
    """Number of rows; None if we do not count them. Raises: DataError for an unusable row."""
    if name.kind != "path":
        return None
    try:
        found = names.local_files(name)
    except DataError:
        return None  # `missing_inputs` reports it
    counts = [_rows_of_file(check, path, alone=len(found) == 1) for path in found]
    known = [count for count in counts if count is not None]
    return (name.count or sum(known)) if len(known) == len(counts) else name.count


def _is_scanned(path: Path) -> bool:
    ratio = _GZIP_RATIO if path.suffix.lower() == ".gz" else 1
    if path.suffix.lower() == ".zst" or inner_suffix(path) not in _SCANNED_SUFFIXES:
        return False  # machines that only submit runs may lack the packages that read them
    return path.stat().st_size * ratio <= SCANNED_BYTES


def _was_read(recipe: Recipe, text: str) -> bool:
    """Whether `_rows` looks at every row of a dataset, as the run has it."""
    name = names.parse(text, use_hf=recipe.bridge.use_hf)
    if name.kind != "path" or recipe.data.preprocess is not None:
        return False
    try:
        return all(map(_is_scanned, names.local_files(name)))
    except DataError:
        return False  # `missing_inputs` reports it


def _rewards_without_columns(recipe: Recipe, found: Collection[str]) -> Iterator[Fault]:
    """Rewards that read a column which no row has, so that none of them could be computed."""
    kind, grpo = recipe.kind, recipe.grpo
    if kind is None or not kind.generates:
        return
    from megabatch.rewards.environment import COLUMN, TURNS
    from megabatch.rewards.named import lacking, plugin_lacking

    has_turns = recipe.rollout.multi_turn_scheduler or recipe.rollout.gym_env
    columns = {*found, *((COLUMN, TURNS) if has_turns else ())}
    for field, named, lacks in (
        ("reward_funcs", grpo.reward_funcs, lambda text: lacking(text, recipe, columns)),
        ("reward_model_plugin", grpo.reward_model_plugin, lambda text: plugin_lacking(text, columns)),
    ):
        for text in named:
            with suppress(ConfigError):  # `launch_checks` reports it, unless the ranks run another Python
                if rule := lacks(text):
                    has = ", ".join(sorted(columns)) or "no other columns"
                    yield Fault(f"grpo.{field}", text, f"{rule}, and no row of the data has it: rows have {has}")


def _rows_of_file(check: Check, path: Path, *, alone: bool) -> int | None:
    if not _is_scanned(path):
        return None
    rows = 0
    for rows, row in enumerate(files.rows(path), start=1):  # noqa: B007 - counted
        check(row)
    if not rows and path.stat().st_size and alone:
        raise DataError(f"{path} holds no rows; give a file with at least one example")
    return rows


def _too_few(recipe: Recipe, counts: list[int | None]) -> list[Fault]:
    """A row gives at most one sample, and a pack takes at least one row. But documents may be cut into several, and
    `preprocess` may make several rows of one, and `interleave_prob` may draw one several times."""
    data = recipe.data
    if data.truncation_strategy == "split" or data.preprocess is not None or data.interleave_prob is not None:
        return []
    batch, rows = recipe.batch.global_batch_size, [count for count in counts if count is not None]
    if len(rows) < len(counts) or not isinstance(batch, int):
        return []
    if recipe.kind is not None and recipe.kind.rows == "prompts":
        return _too_few_prompts(recipe, sum(rows))
    if not 0 < sum(rows) < batch:
        return []
    rule = f"is more than the {sum(rows)} rows of data.dataset; lower it to {sum(rows)} or less, or add data"
    return [Fault("batch.global_batch_size", batch, rule)]


def _one_kind(recipe: Recipe, kinds: Mapping[int, Origin]) -> list[Fault]:
    """Of what the loss tells apart, such as good and bad answers; if all rows were read."""
    from megabatch.data.rows.contrast import contrast_of

    contrast = contrast_of(recipe)
    if contrast is None or len(kinds) != 1 or not all(_was_read(recipe, text) for text in recipe.data.dataset):
        return []
    (kind, first), *_ = kinds.items()
    return [Fault("data.dataset:", None, f"{first}: {contrast.lacking(kind)}", bare=True)]


def _too_few_prompts(recipe: Recipe, rows: int) -> list[Fault]:
    """A round draws each prompt once."""
    grpo = filled(recipe.grpo, recipe.rollout, global_batch_size=recipe.batch.global_batch_size)
    wanted = resolved(grpo.generation_batch_size) // grpo.num_generations
    if not 0 < rows < wanted:
        return []
    rule = f"gives rounds of {wanted} prompts, more than the {rows} rows of data.dataset; lower it, or add data"
    return [Fault("grpo.generation_batch_size", grpo.generation_batch_size, rule)]


def _model(recipe: Recipe, model: FoundModel) -> Iterator[Fault]:
    name = recipe.model.model
    if model.fault is not None:
        yield model.fault
    elif name is not None and model.shape is None and model.folder is None:
        if is_hub_name(name):
            fix = download_command(name, use_hf=recipe.bridge.use_hf)
            rule = f"is neither a local folder nor downloaded, so its shape is not known; run first: {fix}"
        else:
            rule = f"does not exist{nearest_folder(Path(name).expanduser())}"
        yield Fault("model.model", name, rule)


def _tokenizer(recipe: Recipe, model: FoundModel, check: Callable[[Path], None]) -> Iterator[Fault]:
    folder = _tokenizer_folder(recipe, model)
    if folder is None:
        return
    try:
        check(folder)
    except DataError as error:
        yield fault_of("model.tokenizer", error)


def _tokenizer_folder(recipe: Recipe, model: FoundModel) -> Path | None:
    """None for one that is not here: of a hub, trained on the data of a new model, or that of a folder that is no
    model, such as an adapter."""
    name = recipe.model.tokenizer
    if name is None and model.shape is None and model.fault is not None:
        return None
    folder = model.folder if name is None else Path(name).expanduser()
    return None if name is not None and folder is not None and not folder.is_dir() and is_hub_name(name) else folder


def _answers(recipe: Recipe, model: FoundModel) -> list[Fault]:
    """Of a task whose answers are tokens, the faults of those that the tokenizer does not have."""
    folder = _tokenizer_folder(recipe, model)
    if folder is None or recipe.kind is None or recipe.kind.rows != "yes_no":
        return []
    entries, group = tokenizer.ids(folder), recipe.reranker
    answers = {
        "generative_reranker_positive_token": group.generative_reranker_positive_token,
        "generative_reranker_negative_token": group.generative_reranker_negative_token,
    }
    return [
        Fault(f"reranker.{name}", token, tokenizer.NO_ENTRY)
        for name, token in answers.items()
        if entries is not None and token not in entries
    ]


def _template_variables(recipe: Recipe, model: FoundModel) -> Iterator[Fault]:
    """Those that the chat template does not even mention; whether it reads the others is seen when it is compiled."""
    folder, data = _tokenizer_folder(recipe, model), recipe.data
    if not data.template_variables or (folder is None and data.template is None and recipe.model.model):
        return
    texts = tokenizer.template_texts(folder) if folder is not None and data.template is None else []
    texts = texts or list(OWN_TEMPLATES.values())
    for name in data.template_variables:
        if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts):
            field = "enable_thinking" if name == "enable_thinking" and data.enable_thinking is not None else None
            rule = f"gives the chat template {name}, which it does not read; leave it out"
            yield Fault(f"data.{field or 'chat_template_kwargs'}", data.template_variables[name], rule)


def _weights(recipe: Recipe, model: FoundModel) -> Iterator[Fault]:
    if model.folder is None or model.fault is not None:
        return
    from megabatch.converters.hf_model import open_hf_model  # a dry run reads no weights

    try:
        open_hf_model(model.folder, compare_duplicates="sampled")
    except MegabatchError as error:
        yield fault_of("model.model", error)


def _load(recipe: Recipe, shape: ModelShape | None) -> Iterator[Fault]:
    group = recipe.checkpoint
    if group.load is None:
        return
    from megabatch.converters.folder_kinds import adapter_fault  # most runs load nothing

    try:
        found = find_to_load(group.load, may_be_missing=not group.exit_on_missing_checkpoint)
    except CheckpointError as error:
        yield fault_of("checkpoint.load", error)
        return
    if found is not None and adapter_fault(found.weights):
        rule = "is a checkpoint of adapters alone; name it in tuner.adapter_load, or load the model merged with them"
        yield Fault("checkpoint.load", group.load, rule)
        return
    if found is not None and shape is not None:
        yield from _other_sizes(found, shape, load=group.load)
    is_base = recipe.tuner.tuner_type == "lora"  # of which the weights are loaded alone
    if found is not None and not group.finetune and not found.of_a_run and not is_base:
        rule = (
            "is a checkpoint of another program, which does not say where its run was; set checkpoint.finetune=True "
            "to load its weights alone"
        )
        yield Fault("checkpoint.load", group.load, rule)
    if found is not None and not (group.finetune or group.no_load_optim or is_base):
        yield from _other_optimizer(found, recipe)
    if found is not None and not is_base:
        yield from not_to_go_on("checkpoint.load", group.load, found, recipe)


_SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "num_experts", "moe_ffn_hidden_size",
)  # fmt: skip
"""Sizes that a checkpoint and the model that loads it share, whatever the vocabulary and the head are."""


def _other_optimizer(found: FoundCheckpoint, recipe: Recipe) -> Iterator[Fault]:
    """The optimizer of the run that the checkpoint lies in; nothing where it lies in none, and the trainer asks it."""
    own, run_json = recipe.optimizer.optimizer, RunDirectory(found.folder.parent.parent).run_json
    if not found.of_a_run or not run_json.is_file():
        return
    try:
        saved = json.loads(run_json.read_text(encoding="utf-8"))["recipe"]["optimizer"]["optimizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if saved != own:
        rule = (
            f"is a checkpoint of a run with optimizer={saved!r}, whose state optimizer.optimizer={own!r} cannot go on "
            "from; set no_load_optim=True to begin with fresh state"
        )
        yield Fault("checkpoint.load", recipe.checkpoint.load, rule)


def _other_sizes(found: FoundCheckpoint, shape: ModelShape, *, load: str) -> Iterator[Fault]:
    """Sizes that the config.json in a checkpoint's `hf/` contradicts; nothing where there is none."""
    saved = find_shape(found.folder / HF)
    if saved is None:
        return
    sizes = [(name, getattr(saved, name), getattr(shape, name)) for name in _SIZES]
    if differing := [f"{name} is {had} in it and {has} in the model" for name, had, has in sizes if had != has]:
        yield Fault("checkpoint.load", load, f"is a checkpoint of another model: {', '.join(differing)}")
