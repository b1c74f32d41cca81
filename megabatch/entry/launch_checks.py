"""Checks of the machine and the cluster before anything is queued.

Runs, chains and sweeps share this module; the checks themselves are in `input_checks` and `mounts`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from megabatch.callbacks import load as load_callback
from megabatch.config.data import Data
from megabatch.config.monitoring import missing_tracker
from megabatch.config.recipe import Recipe
from megabatch.config.user_code import user_code
from megabatch.data.rows.names import parse
from megabatch.data.rows.preprocess import preprocess_of
from megabatch.entry.input_checks import damaged_inputs, missing_gpus, missing_inputs, occupied, unwritable
from megabatch.entry.launch import Launch
from megabatch.entry.megatron_fields import unknown_fields
from megabatch.entry.model import FoundModel
from megabatch.entry.mounts import unmounted
from megabatch.errors import ConfigError, DataError, Fault, LaunchError, RolloutError
from megabatch.hub_cache import is_hub_name
from megabatch.secret_text import tokens_in
from megabatch.slurm.profile import ClusterProfile
from megabatch.user_code import files_to_archive


def missing_here(launch: Launch, *, local: bool, own: Recipe | None = None) -> list[Fault]:
    """Missing inputs that names and sizes show; also missing GPUs for `--local`, else inputs outside the container.

    Args: `own` is the recipe without the inputs that other runs have yet to make.
    """
    recipe = own or launch.recipe
    grpo, same_python = recipe.grpo, local or not _brings_python(launch.profile)
    environments = [text for text in (recipe.rollout.multi_turn_scheduler, recipe.rollout.gym_env) if text]
    found = [
        *missing_inputs(recipe, launch.model, shared_cache=launch.profile.shared_cache),
        *_preprocess(recipe.data, same_python=same_python),
        *_user_code("watching.callbacks", recipe.watching.callbacks, load_callback, same_python=same_python),
        *_user_code("grpo.reward_funcs", grpo.reward_funcs, _check_reward, same_python=same_python),
        *_user_code("grpo.reward_model_plugin", grpo.reward_model_plugin, _check_plugin, same_python=same_python),
        *_user_code("rollout.multi_turn_scheduler", environments, _check_environment, same_python=same_python),
        *(_tracker(recipe.logging.report_to) if same_python else []),
        *(_vllm(recipe) if same_python else []),
        *(unknown_fields(recipe) if same_python else []),
        *(_modelscope(recipe, launch.model) if same_python else []),
        *([] if local else _engines(launch)),
        *([] if local else _host_memory(launch)),
        *([] if local else _secrets_of(files_to_archive(user_code(recipe)).values())),
    ]
    return found + (missing_gpus(recipe) if local else [*unmounted(launch), *_untrainable(launch.profile)])


def _user_code(field: str, named: Sequence[str], load: Callable[[str], object], *, same_python: bool) -> list[Fault]:
    """Args: same_python: the ranks run this Python; we cannot know what another one has installed."""
    faults = []
    for text in named:
        try:
            load(text)
        except ConfigError as error:
            if same_python or not isinstance(error.__cause__, ImportError):
                faults.append(Fault(field, text, f"cannot be used: {error}"))
    return faults


def _check_reward(text: str) -> None:
    """Imported here, as the two below: rewards and environments bring asyncio and HTTP, and most runs have none."""
    from megabatch.rewards.named import check_reward

    check_reward(text)


def _check_plugin(text: str) -> None:
    from megabatch.rewards.named import check_plugin

    check_plugin(text)


def _check_environment(text: str) -> None:
    from megabatch.rollout.turns.environment import environment_of

    environment_of(text)


def _preprocess(data: Data, *, same_python: bool) -> list[Fault]:
    if data.preprocess is None:
        return []
    return _user_code("data.preprocess", [data.preprocess], lambda _: preprocess_of(data), same_python=same_python)


def _tracker(package: str | None) -> list[Fault]:
    rule = None if package is None else missing_tracker(package)
    return [] if rule is None else [Fault("logging.report_to", package, rule)]


def _vllm(recipe: Recipe) -> list[Fault]:
    """Whether ranks that are to have vLLM inside them can import it."""
    if recipe.rollout.vllm_mode != "colocate":
        return []
    from megabatch.rollout.vllm.engine_options import check_installed  # imports importlib.metadata, and so email

    try:
        check_installed()
    except RolloutError as error:
        return [Fault("rollout.vllm_mode", "colocate", f"needs vLLM beside the trainer: {error}")]
    return []


def _modelscope(recipe: Recipe, model: FoundModel) -> Iterator[Fault]:
    """What comes from ModelScope, where this Python lacks its client."""
    if find_spec("modelscope") is not None:
        return
    rule = f"is on ModelScope, whose package modelscope {sys.executable} lacks (pip install modelscope)"
    name, use_hf = recipe.model.model, recipe.bridge.use_hf
    if name is not None and is_hub_name(name) and model.folder is None and not use_hf:
        yield Fault("model.model", name, rule, try_=("--use_hf true",))
    for field in ("dataset", "val_dataset"):
        for text in getattr(recipe.data, field):
            if _is_on_modelscope(text, use_hf=use_hf):
                yield Fault(f"data.{field}", text, rule, try_=("--use_hf true, or hf:: before the name",))


def _is_on_modelscope(dataset: str, *, use_hf: bool) -> bool:
    try:
        return parse(dataset, use_hf=use_hf).kind == "ms"
    except DataError:
        return False  # `missing_inputs` reports it


def _engines(launch: Launch) -> list[Fault]:
    """Engines inside the ranks that cannot fit beside the trainer, on GPUs that the cluster profile names."""
    gpu, shape = launch.profile.gpu, launch.model.shape
    if gpu is None or shape is None or not launch.job.gpus_per_node or launch.faults():
        return []
    from megabatch.entry import engine_memory
    from megabatch.entry.estimate import estimate_of, gpu_of

    kind = gpu_of(gpu)
    return list(engine_memory.faults(launch.recipe, shape, estimate_of(launch.recipe, shape, kind), kind))


def _host_memory(launch: Launch) -> list[Fault]:
    """An optimizer in host memory that the job does not ask for."""
    shape = launch.model.shape
    if shape is None or launch.recipe.resources.mem_gib is None or launch.faults():
        return []
    from megabatch.entry import host_memory

    return list(host_memory.faults(launch.recipe, shape))


def _secrets_of(files: Collection[Path]) -> list[Fault]:
    return [fault for file in files for fault in _secrets(file)]


def absent_packages() -> list[str]:
    """The packages that training needs and this Python lacks."""
    return [name for name in ("torch", "megatron", "transformers") if find_spec(name) is None]


def require_torch() -> None:
    """Raises: LaunchError where this Python cannot train."""
    if absent := absent_packages():
        raise LaunchError(
            f"{', '.join(absent)} not installed for {sys.executable}, so this machine cannot train; "
            "pip install 'megabatch[train]', or --submit to a cluster"
        )


def _untrainable(profile: ClusterProfile) -> list[Fault]:
    """Whether the ranks would run this same Python without the training packages; modules and setup may add them."""
    absent = [] if _brings_python(profile) else absent_packages()
    if not absent:
        return []
    rule = (
        f"lacks {', '.join(absent)}, and the ranks would use it; name another with `python`, or a container, in the "
        "cluster profile, or: pip install 'megabatch[train]'"
    )
    return [Fault(sys.executable, None, rule, bare=True)]


def _brings_python(profile: ClusterProfile) -> bool:
    """Whether the ranks may run another Python, or find other packages."""
    brought = profile.python or profile.container or profile.modules or profile.setup
    return bool(brought) or "PYTHONPATH" in profile.environment


def faults_here(launch: Launch, *, local: bool, own: Recipe | None = None, trains: bool = True) -> list[Fault]:
    """Missing inputs; only if none is missing, damaged ones, since finding those means reading files."""
    missing = missing_here(launch, local=local, own=own)
    looked_at, data = own or launch.recipe, launch.recipe.data
    has_all_data = [*looked_at.data.dataset, *looked_at.data.val_dataset] == [*data.dataset, *data.val_dataset]
    return missing or damaged_inputs(
        looked_at,
        launch.model,
        trains=trains,
        has_all_data=has_all_data,
        shared_cache=launch.profile.shared_cache,
    )


def folder_faults(folder: Path, *, recipe_file: Path, local: bool, own: Collection[str] = ()) -> list[Fault]:
    """Faults if `folder` cannot be made or is occupied, or the recipe's file cannot be copied into the snapshot.

    Args: `own` are the names that a sweep or a chain makes in its folder.
    """
    return [*unwritable(folder), *occupied(folder, own=own), *([] if local else _secrets(recipe_file))]


_FIX = (
    "and others can read the copy that a job runs from; export it in the submitting shell, and list its name under "
    "`inherit` of the cluster profile"
)


def _secrets(file: Path) -> list[Fault]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []  # a recipe without a file of its own is not copied
    return [Fault(f"{file}:{line}", None, f"holds {kind}, {_FIX}", bare=True) for line, kind in tokens_in(text)]
