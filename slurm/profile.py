"""Cluster profiles: what is true of a site and not of a run, read from TOML and kept apart from recipes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megabatch.errors import ConfigError, Fault
from megabatch.secret_text import secret_given, secrets_in_words
from megabatch.slurm.ownership import is_others_to_write
from megabatch.slurm.sbatch_options import sbatch_faults
from megabatch.values import dataclass

Network = Literal["none", "single_node", "ethernet", "infiniband", "roce", "efa"]
Runtime = Literal["pyxis", "apptainer"]
GpuRequest = Literal["gpus-per-node", "gres", "gpus-per-task"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """The image that the ranks run in; the batch script itself runs on the host."""

    image: str
    """Pyxis: `nvcr.io#nvidia/pytorch:25.06-py3` or a .sqsh file; Apptainer: a .sif file or `docker://…`."""
    runtime: Runtime = "pyxis"
    """`pyxis` (enroot, srun's own flags) or `apptainer` (`apptainer exec` in front of the command)."""
    mounts: tuple[str, ...] = ()
    """`/host:/inside` or `/both`; the run directory and the code snapshot are always mounted."""
    python: str = "python3"
    """Interpreter inside the image."""
    options: tuple[str, ...] = ()
    """Further arguments of `apptainer exec` (`--cleanenv`), or further Pyxis flags (`--container-mount-home`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparePartition:
    """Where `megabatch prepare --submit` tokenises: a partition of nodes without GPUs."""

    partition: str
    """`--partition`."""
    account: str | None = None
    """`--account`; None is the profile's."""
    qos: str | None = None
    """`--qos`; here and below, the profile's own value is not used, since it belongs to its other partition."""
    constraint: str | None = None
    """`--constraint`."""
    time: str | None = None
    """The longest time limit of this partition."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterProfile:
    """A cluster as this user sees it; every field is optional."""

    partition: str | None = None
    """`--partition`; several, comma-separated, let Slurm take the first that is free."""
    account: str | None = None
    """`--account`: who pays."""
    qos: str | None = None
    """`--qos`."""
    constraint: str | None = None
    """`--constraint`: node features, for example `h100&ib`."""
    reservation: str | None = None
    """`--reservation`."""
    exclude: str | None = None
    """`--exclude`: nodes never to use."""
    time: str | None = None
    """The longest time limit of this partition: a run that asks for more gets this, saves, requeues and continues."""
    modules: tuple[str, ...] = ()
    """Loaded by `module load` in the batch script, in this order."""
    setup: tuple[str, ...] = ()
    """Bash lines to run before the ranks start, for what modules cannot do; complete commands, which may span
    several lines."""
    gpu: str | None = None
    """GPU of its nodes (`H100`), for estimates of memory and time; it does not change the Slurm request."""
    gpu_request: GpuRequest = "gpus-per-node"
    """The option by which this site expects requests for GPUs: `--gpus-per-node=8`, `--gres=gpu:8`,
    `--gpus-per-task=1`."""
    gpu_type: str | None = None
    """The GPUs' type in Slurm (`a100` of `gpu:a100:8` in `sinfo -o %G`); None takes any."""
    network: Network = "ethernet"
    """The network between nodes; selects the NCCL preset of multi-node GPU jobs."""
    shared_cache: str | None = None
    """Folder on shared storage for downloaded models and datasets (HF_HOME and others); None leaves these unset."""
    local_cache: str = "/tmp"
    """Folder on each node's own disk for compiled kernels; a private folder is made inside."""
    python: str | None = None
    """Interpreter of the ranks outside a container; None is the submitting one."""
    container: Container | None = None
    """None runs on the host."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for every job here; they win over the presets. No secrets: name those under `inherit`."""
    inherit: tuple[str, ...] = ()
    """Names of variables (secrets) that jobs take from the submitting shell."""
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)
    """Further sbatch options by name, for example `{mail-type = "END", exclusive = true}`; options that the job
    script sets itself are refused."""
    srun: tuple[str, ...] = ()
    """Further arguments of srun."""
    prepare: PreparePartition | None = None
    """Where `megabatch prepare --submit` tokenises; None is this partition, without GPUs."""

    def of_preparation(self) -> ClusterProfile:
        """The profile for a job that tokenises, without the settings of the GPU partition."""
        other = self.prepare
        if other is None:
            options = {name: value for name, value in self.sbatch.items() if "gpu" not in name}
            return replace(self, sbatch=options)
        return replace(
            self, partition=other.partition, account=other.account or self.account, qos=other.qos,
            constraint=other.constraint, reservation=None, exclude=None, time=other.time, sbatch={}, srun=(),
        )  # fmt: skip


def profile_path(cluster: str) -> Path:
    """File of `--cluster NAME`: NAME itself if it looks like a path, else in the user's folder of clusters."""
    if cluster.endswith(".toml") or os.sep in cluster:
        return Path(cluster).expanduser()
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "megabatch" / "clusters" / f"{cluster}.toml"


def load_profile(cluster: str) -> ClusterProfile:
    """Reads the profile given by `--cluster`.

    Raises: ConfigError for a missing file, one that others can write, bad TOML, unknown keys (all of them, each with
    the nearest name), wrong types, secrets, options of sbatch that are not a profile's to set, and `setup` that is not
    bash.
    """
    import tomllib  # these imports take as long as reading the profile, and most dry runs have no profile

    from megabatch.slurm.bash_syntax import setup_faults

    path = profile_path(cluster)
    try:
        table = tomllib.loads(_text(path))
    except FileNotFoundError as error:
        known = sorted(file.stem for file in path.parent.glob("*.toml"))
        hint = f"; clusters there: {', '.join(known)}" if known else ""
        raise ConfigError(f"--cluster={cluster!r}: no such file {path}{hint}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--cluster={cluster!r}: cannot read {path}: {error}") from error
    faults: list[Fault] = []
    profile = _build(ClusterProfile, table, place="cluster", faults=faults)
    faults += sbatch_faults(table, file=path)
    faults += _secrets(table, "cluster")
    faults += setup_faults(profile.setup, file=path) if profile is not None else []
    if faults:
        raise ConfigError(faults)
    return profile


def _text(path: Path) -> str:
    """Raises: ConfigError for a file that others can write, since we run its `setup` unchanged; OSError."""
    with open(path, encoding="utf-8") as file:
        if is_others_to_write(os.fstat(file.fileno())):
            raise ConfigError(
                f"{path} can be written by others, and jobs execute it: check its content, then run: chmod go-w {path}"
            )
        return file.read()


def _build(cls: Any, table: Mapping[str, Any], *, place: str, faults: list[Fault]) -> Any:
    """An instance of the dataclass `cls` from a TOML table; collects every fault, and returns None if there is one."""
    hints = get_type_hints(cls)
    before = len(faults)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            faults.append(_unknown(f"{place}.{key}", key, known=list(hints)))
        else:
            values[key] = _convert(hints[key], value, place=f"{place}.{key}", faults=faults)
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in table]
    faults += [Fault(f"{place}.{name}", None, "is required", bare=True) for name in missing]
    return None if len(faults) > before else cls(**values)


def _convert(hint: Any, value: Any, *, place: str, faults: list[Fault]) -> Any:
    """Converts `value` to the annotation `hint`: lists become tuples, tables become dataclasses."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(option for option in options if option is not type(None))
    origin = get_origin(kind)
    if origin is Literal:
        return _expect(value in get_args(kind), value, place, "is not a choice", faults, choices=get_args(kind))
    if origin is tuple:
        strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return tuple(_expect(strings, value, place, "must be a list of strings", faults) or ())
    if is_dataclass(kind):
        needed = next(f.name for f in fields(kind) if f.default is MISSING)
        return (
            _build(kind, value, place=place, faults=faults)
            if isinstance(value, dict)
            else _expect(False, value, place, f"must be a table with at least `{needed}`", faults)
        )
    if origin is not None:
        return _mapping(kind, value, place=place, faults=faults)
    return _expect(isinstance(value, str), value, place, "must be a string", faults)


def _mapping(kind: Any, value: Any, *, place: str, faults: list[Fault]) -> Any:
    allowed = get_args(kind)[1]
    types = get_args(allowed) if isinstance(allowed, UnionType) else (allowed,)
    wanted = " or ".join(option.__name__ for option in types)
    fits = isinstance(value, dict) and all(isinstance(item, types) for item in value.values())
    return _expect(fits, value, place, f"must be a table of {wanted} values", faults)


def _expect(ok: bool, value: Any, place: str, rule: str, faults: list[Fault], *, choices: tuple[Any, ...] = ()) -> Any:
    if not ok:
        faults.append(Fault(place, value, rule, try_=choices))
    return value if ok else None


def _secrets(value: Any, place: str) -> Iterator[Fault]:
    """Texts of a profile that hold a secret; all of them end up in scripts that others can read."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _secrets(item, f"{place}.{key}")
        return
    words = value if isinstance(value, list) else [value]
    name = place.rpartition(".")[2]
    kinds = {secret_given(name, word) for word in words if isinstance(word, str)}
    kinds.update(secrets_in_words([word for word in words if isinstance(word, str)]))
    for kind in sorted(kinds - {None}, key=str):
        rule = f"holds {kind}, but others can read job scripts; export it in the submitting shell and "
        yield Fault(place, None, rule + "list its name under `inherit`", bare=True)


def _unknown(place: str, key: str, *, known: list[str]) -> Fault:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return Fault(place, None, "is unknown", try_=near or sorted(known), bare=True)
