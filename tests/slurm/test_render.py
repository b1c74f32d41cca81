"""The rendered script, without Slurm."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megabatch.config.roles import Role
from megabatch.errors import LaunchError
from megabatch.slurm.environment import NETWORKS, job_variables, reference_table
from megabatch.slurm.job import Input, JobSpec
from megabatch.slurm.profile import ClusterProfile, Container
from megabatch.slurm.quoting import directive, label, shell
from megabatch.slurm.render import render

GOLDENS = Path(__file__).with_name("goldens")

GPU_JOB = JobSpec(
    name="qwen3-moe-sft",
    run_directory=Path("/shared/runs/qwen3-moe-sft"),
    nodes=2,
    tasks_per_node=8,
    gpus_per_node=8,
    cpus_per_task=12,
    time="24:00:00",
    python="/shared/venv/bin/python",
    snapshot=Path("/shared/runs/code/0123456789abcdef.tar"),
    working_directory=Path("/home/someone/project"),
    inherit=("WANDB_API_KEY",),
)
SITE = ClusterProfile(
    partition="gpu",
    account="nlp",
    qos="high",
    constraint="h100&ib",
    time="12:00:00",
    modules=("cuda/12.8",),
    network="infiniband",
    shared_cache="/shared/cache",
    environment={"NCCL_IB_HCA": "=mlx5_0,mlx5_1"},
    sbatch={"exclusive": True, "mail-type": "END"},
)
IMAGE = Container(image="/images/train.sqsh", mounts=("/data:/data",))
SERVER = Role(name="server", command=("python", "serve.py"), nodes=2, gpus_per_node=8, cpus_per_task=96)
EARLIER = Path("/shared/runs/pretrain")
INPUTS = (Input(GPU_JOB.run_directory / "inputs/pretrain/hf", EARLIER, GPU_JOB.run_directory / "inputs/pretrain"),)
CASES: dict[str, tuple[JobSpec, ClusterProfile]] = {
    "infiniband": (GPU_JOB, SITE),
    "cpu": (JobSpec(name="quickstart", run_directory=Path("/runs/quickstart"), tasks_per_node=2), ClusterProfile()),
    "pyxis_efa": (GPU_JOB, ClusterProfile(partition="p5", network="efa", container=IMAGE)),
    "apptainer_roce": (
        GPU_JOB,
        ClusterProfile(network="roce", container=replace(IMAGE, runtime="apptainer", image="/images/train.sif")),
    ),
    "single_node": (replace(GPU_JOB, nodes=1, requeue=False), SITE),
    "links_and_roles": (
        replace(GPU_JOB, links=3, requeue=False, inputs=INPUTS, roles=(SERVER,)),
        SITE,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_goldens(name: str) -> None:
    golden = GOLDENS / f"{name}.sbatch"
    text = render(*CASES[name])
    if os.environ.get("MEGABATCH_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text(), "if this change is meant: make golden, and review the diff"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_every_golden_has_its_case() -> None:
    assert {path.stem for path in GOLDENS.iterdir()} == set(CASES)


def test_any_number_of_nodes_costs_the_same_script() -> None:
    one, many = render(replace(GPU_JOB, nodes=2), SITE), render(replace(GPU_JOB, nodes=1024), SITE)
    assert len(many) - len(one) < 10


@pytest.mark.parametrize(
    "text", ["plain", "", "a b", "'", '"', "$(x)", "`x`", "\\", "a\nb\tc\r", "é漢\u2028", "-n", "!x", "\\'\n$HOME'"]
)
def test_shell_words_are_exactly_the_text_on_one_line(text: str) -> None:
    word = shell(text)
    assert "\n" not in word
    script = f'x={word}; printf "%s" "$x"'
    assert subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout == text.encode()


def test_directives_and_labels() -> None:
    assert directive("nodes", 2) == "#SBATCH --nodes=2"
    assert directive("requeue", True) == "#SBATCH --requeue"
    assert directive("comment", 'a "b" #c\\') == '#SBATCH --comment="a \\"b\\" #c\\\\"'
    assert label("a\nb") == "a b"
    assert label("\n") == "megabatch"
    with pytest.raises(LaunchError, match="control character"):
        directive("output", "a\nb")
    with pytest.raises(LaunchError, match="not the name of an sbatch option"):
        directive("x\ntouch /tmp/x", "1")


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_KEY", "DB_PASS"])
def test_a_secret_is_refused_wherever_it_is_set(name: str) -> None:
    with pytest.raises(LaunchError, match=rf"{name}.*inherit"):
        render(replace(GPU_JOB, environment={name: "x"}), SITE)
    with pytest.raises(LaunchError, match=rf"{name}.*inherit"):
        render(GPU_JOB, ClusterProfile(environment={name: "x"}))


@pytest.mark.parametrize("value", ["Authorization: Bearer hunter2xyz", "--api-key hunter2xyz", "TOKEN=hunter2xyz"])
def test_a_secret_in_a_value_or_a_command_is_refused_and_not_shown(value: str) -> None:
    leaks = (
        replace(GPU_JOB, environment={"X": value}),
        replace(GPU_JOB, program=("serve", *value.split(" ", 1))),
        replace(GPU_JOB, arguments=("bash", "-c", f"./x {value}")),
        replace(GPU_JOB, roles=(replace(SERVER, command=["serve", "-H", value]),)),
    )
    for job in leaks:
        with pytest.raises(LaunchError, match="export it in the submitting shell") as caught:
            render(job, SITE)
        assert "hunter2" not in str(caught.value)


def test_names_that_are_not_names_are_refused() -> None:
    for job in (replace(GPU_JOB, environment={"A=$(x)": "1"}), replace(GPU_JOB, inherit=("A;x",))):
        with pytest.raises(LaunchError, match="not a name"):
            render(job, SITE)


SLURMS_WORDS = {"JobId", "ExcNodeList", "Restarts", "Requeue", "NodeAddr"}


def assigned(script: str) -> set[str]:
    """Every variable that a script sets."""
    code = "\n".join(line for line in script.split("\n") if not line.lstrip().startswith("#"))
    names = set(re.findall(r"(?:^|[\s;({])([A-Za-z_]\w*)\+?=", code, re.MULTILINE)) - SLURMS_WORDS
    for listed in re.findall(r"\b(?:local|read|for|mapfile|declare|exec|while read) ([^<>;&|\n]*)", code):
        words = listed.split(" in ")[0].replace("((", "").split()
        names |= {word.strip("{}").partition("=")[0] for word in words if re.match(r"\{?[A-Za-z_]\w*[}=]?", word)}
    return {name for name in names if re.fullmatch(r"[A-Za-z_]\w*", name)}


def test_what_the_script_sets_is_nobodys_to_set() -> None:
    everything = replace(GPU_JOB, inputs=INPUTS, roles=(SERVER,), preflight="full")
    jobs = [everything, replace(everything, links=3, requeue=False)]
    profiles = [SITE, ClusterProfile(container=IMAGE), CASES["apptainer_roce"][1]]
    free = {v.name for job in jobs for profile in profiles for v in job_variables(job, profile)} | {"PYTHONPATH"}
    own = set().union(*(assigned(render(job, profile)) for job in jobs for profile in profiles)) - free
    assert {"stop", "status", "nodes", "hosts", "role_tick", "verdict", "task", "RANK", "MASTER_PORT"} <= own
    assert len(own) > 60
    for name in own | {"IFS", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK", "LOCAL_RANK", "BASH_ENV", "MEGABATCH_ROLE_TOKEN"}:
        for leak in (({name: "x"}, {}), ({}, {name: "x"})):
            with pytest.raises(LaunchError, match=rf"^environment\.{name} "):
                render(replace(GPU_JOB, environment=leak[0]), replace(SITE, environment=leak[1]))


def test_all_refused_variables_are_named_together() -> None:
    with pytest.raises(
        LaunchError, match=r"environment.RANK is set.*; environment.HF_TOKEN looks.*; environment.stop "
    ):
        render(replace(GPU_JOB, environment={"RANK": "0", "HF_TOKEN": "x", "stop": "1"}), SITE)


def test_other_variables_are_the_users() -> None:
    names = "PATH LD_LIBRARY_PATH PYTHONPATH http_proxy no_proxy HOME LC_ALL OMP_NUM_THREADS MEGABATCH_CACHE TMPDIR"
    script = render(replace(GPU_JOB, environment=dict.fromkeys(names.split(), "/x")), SITE)
    for name in names.split():
        assert f"\nexport {name}=/x" in script
    assert '\nexport PATH=/x"${PATH:+:$PATH}"\n' in script, "the script finds its own programs still"
    with pytest.raises(LaunchError, match=r"environment.PATH contains a \$ that nothing expands"):
        render(replace(GPU_JOB, environment={"PATH": "/x:$PATH"}), SITE)


def test_a_warning_must_come_before_the_limit() -> None:
    with pytest.raises(LaunchError, match=r"signal_delay_s=90 must be below the time limit of 60 s.*try 15"):
        render(replace(GPU_JOB, time="1"), ClusterProfile())


def test_memory_is_asked_for_once() -> None:
    assert "#SBATCH --mem-per-gpu=10G\n" in render(GPU_JOB, replace(SITE, sbatch={"mem-per-gpu": "10G"}))
    with pytest.raises(
        LaunchError, match=r"resources.mem_gib=5 and the profile's sbatch.mem='10G' both request memory"
    ):
        render(replace(GPU_JOB, mem_gib=5), replace(SITE, sbatch={"mem": "10G"}))


def test_the_nearest_wins_and_each_variable_is_set_once() -> None:
    profile = replace(SITE, environment={"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2"})
    variables = job_variables(replace(GPU_JOB, environment={"NCCL_DEBUG": "TRACE"}), profile)
    values = {v.name: v.value for v in variables}
    assert len(values) == len(variables)
    assert (values["NCCL_DEBUG"], values["OMP_NUM_THREADS"]) == ("TRACE", "2")


def test_one_node_needs_no_network() -> None:
    names = {v.name for v in job_variables(replace(GPU_JOB, nodes=1), SITE)}
    assert "NCCL_IB_DISABLE" in names
    assert "NCCL_NET" not in names


def test_every_variable_has_a_reason() -> None:
    presets = [variables for variables in NETWORKS.values()]
    jobs = [job_variables(replace(GPU_JOB, nodes=nodes), SITE) for nodes in (1, 2)]
    assert not [v.name for variables in presets + jobs for v in variables if len(v.reason.split()) < 3]


def test_the_docs_show_every_variable() -> None:
    docs = Path(__file__).parents[2] / "docs" / "slurm.md"
    text = docs.read_text()
    before, rest = text.split("<!-- presets: printed by python -m megabatch.slurm.environment -->\n")
    after = rest.split("<!-- end of presets -->\n")[1]
    new = (
        f"{before}<!-- presets: printed by python -m megabatch.slurm.environment -->\n"
        f"{reference_table()}<!-- end of presets -->\n{after}"
    )
    if os.environ.get("MEGABATCH_GOLDEN") == "1":
        docs.write_text(new)
    assert text == new or os.environ.get("MEGABATCH_GOLDEN") == "1", "run: make golden"


def test_a_container_mount_with_a_comma_is_refused() -> None:
    with pytest.raises(LaunchError, match="comma"):
        render(replace(GPU_JOB, run_directory=Path("/a,b")), ClusterProfile(container=IMAGE))
