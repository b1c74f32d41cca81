"""Chains on a real Slurm and on this machine, by the commands that a person gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megabatch import Chain, ended, notok, ok, output
from megabatch.chain.record import StepState, recorded_chain, states
from megabatch.cli.command import main as megabatch
from megabatch.cli.recipe_command import run
from megabatch.errors import ConfigError, LaunchError
from megabatch.run_directory import RunDirectory
from megabatch.slurm.records import read_records

from ..slurm.conftest import until
from .conftest import chain_of, shell

MAKES = shell("makes", 'echo 21 >"$MEGABATCH_RUN/number"', outputs=["number"])
READS = shell("reads", f"echo $((2 * $(cat {output('makes').file('number')}))) >>answer", ok("makes"))


def command(chain: Chain, *words: str) -> int:
    """The chain file's command line."""

    def recipe() -> Chain:
        return chain

    return run(recipe, words)


def waited(chain: Chain) -> dict[str, tuple[str, str | None]]:
    """State and fate of each step once nothing waits or runs."""
    assert chain.save is not None
    folder = Path(chain.save)

    def over() -> list[StepState] | None:
        found = states(chain, folder)
        return found if all(one.fate for one in found) else None

    found = until(over, what="the end of all steps")
    return {one.step.name: (one.status.state.value, one.fate) for one in found}


def failing(folder: Path) -> Chain:
    """A chain whose middle step fails until there is a file `fixed`."""
    return chain_of(
        folder,
        MAKES,
        READS,
        shell("breaks", f"test -e {folder}/fixed || exit 3", ok("reads")),
        shell("exports", "echo exported", ok("breaks")),
        shell("reports", "echo failed", notok("breaks")),
        shell("cleans", "echo clean", ended("exports", "reports")),
    )


FAILED = {
    "makes": ("completed", "done"),
    "reads": ("completed", "done"),
    "breaks": ("failed", "failed"),
    "reports": ("completed", "done"),
    "cleans": ("completed", "done"),
}


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_submitted_shown_and_submitted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = failing(tmp_path)
    assert command(chain, "--submit") == 0
    assert capsys.readouterr().out.count("submitted ") == 6
    assert waited(chain) == FAILED | {"exports": ("cancelled", "never")}
    assert (tmp_path / "answer").read_text() == "42\n"
    assert megabatch(["chain", "show", str(tmp_path / "demo")]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "exit code 3" in shown["breaks"] and shown["exports"].endswith("breaks failed")
    assert "never runs" in shown["exports"] and "completed" in shown["reports"]

    (tmp_path / "fixed").touch()
    assert command(chain, "--submit") == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("submitted")] == [
        "breaks:",
        "exports:",
        "reports:",
        "cleans:",
    ]
    done = {name: ("completed", "done") for name in FAILED | {"exports": ""}}
    assert waited(chain) == done | {"reports": ("cancelled", "never")}
    assert (tmp_path / "answer").read_text() == "42\n", "what was done is not done again"
    assert megabatch(["chain", "show", str(tmp_path / "demo")]) == 0
    assert "breaks ended well" in capsys.readouterr().out

    assert command(chain, "--submit") == 0
    assert "nothing to submit" in capsys.readouterr().out
    changed = replace(chain, steps=[shell("makes", "echo 22", outputs=["number"]), *chain.steps[1:]])
    with pytest.raises(ConfigError, match=r"makes: argv is completed already, but is now declared differently"):
        command(changed, "--submit")


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_what_waits_for_a_job_in_the_queue_is_added_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = shell("slow", "sleep 3")
    command(chain_of(tmp_path, slow), "--submit")
    longer = chain_of(tmp_path, slow, shell("then", "echo then", ok("slow")))
    assert command(longer, "--submit") == 0
    assert "submitted slow" not in capsys.readouterr().out.split("chain show")[1]
    assert waited(longer) == {"slow": ("completed", "done"), "then": ("completed", "done")}


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_cancelled_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = chain_of(
        tmp_path, shell("slow", "sleep 60"), shell("next", "true", ok("slow")), shell("anyway", "true", ended("slow"))
    )
    command(chain, "--submit")
    folder = str(tmp_path / "demo")
    assert megabatch(["chain", "cancel", folder]) == 0
    said = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("cancelled")]
    assert said == ["anyway:", "next:", "slow:"]
    assert {state for state, _ in waited(chain).values()} == {"cancelled"}
    assert megabatch(["chain", "cancel", folder]) == 0
    assert "no step" in capsys.readouterr().out
    assert megabatch(["cancel", f"{folder}/slow"]) == 1
    assert "not in the queue" in capsys.readouterr().err


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_step_that_is_about_to_end_is_not_waited_for(tmp_path: Path) -> None:
    deaf = shell("deaf", "trap '' TERM USR2; touch $MEGABATCH_RUN/there; while :; do sleep 0.1; done")
    chain = chain_of(tmp_path, deaf, shell("after", "true", ok("deaf")))
    assert command(chain, "--submit") == 0
    until((tmp_path / "demo" / "deaf" / "there").exists)
    [job] = read_records(RunDirectory(tmp_path / "demo" / "deaf"))
    assert megabatch(["chain", "cancel", str(tmp_path / "demo")]) == 0
    with pytest.raises(
        LaunchError, match=f"deaf: job {job.job_id} is cancelled, still saving; submit the chain again"
    ):
        command(chain, "--submit")
    assert waited(chain) == {"deaf": ("cancelled", "failed"), "after": ("cancelled", "never")}
    assert len(read_records(RunDirectory(tmp_path / "demo" / "after"))) == 1


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_missing_input_is_named_by_the_job_that_wants_it(tmp_path: Path) -> None:
    lies = shell("makes", "true", outputs=["number"])
    chain = chain_of(tmp_path, lies, READS)
    command(chain, "--submit")
    assert waited(chain)["reads"] == ("failed", "failed")
    [log] = (tmp_path / "demo" / "reads" / "logs").glob("batch.*.log")
    assert f"megabatch: input missing: {tmp_path}/demo/makes/number" in log.read_text()
    [job] = read_records(RunDirectory(tmp_path / "demo" / "reads"))
    assert [ending.exit_code for ending in job.endings] == [2]


@pytest.mark.usefixtures("slurm")
@pytest.mark.slurm
def test_a_chain_that_slurm_refuses_half_way_leaves_nothing(tmp_path: Path) -> None:
    steps = [MAKES, replace(READS, work=replace(READS.work, resources=replace(READS.work.resources, nodes=99)))]  # type: ignore[union-attr, type-var, call-arg]
    with pytest.raises(LaunchError, match=r"reads: sbatch refused.*was cancelled"):
        command(chain_of(tmp_path, *steps), "--submit")
    assert not list(tmp_path.glob("demo/*/jobs.jsonl")) and not (tmp_path / "demo" / "chain.json").exists()


def test_on_this_machine_with_the_same_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = failing(tmp_path)
    assert command(chain, "--local") == 3
    out = capsys.readouterr().out
    assert "=== breaks: failed with exit code 3" in out and "=== exports: never starts" in out
    assert waited(chain) == FAILED | {"exports": ("not_submitted", "never")}
    (tmp_path / "fixed").touch()
    assert command(chain, "--local") == 0
    out = capsys.readouterr().out
    assert "=== makes: done already" in out and "=== reports: never starts" in out
    assert (tmp_path / "answer").read_text() == "42\n"
    assert [step.name for step in recorded_chain(tmp_path / "demo").steps] == [step.name for step in chain.steps]


def test_the_example_trains_on_the_tokens_of_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megabatch.cli.recipe_file import loaded

    module = loaded(Path(__file__).parents[2] / "recipes" / "chains" / "prepared_chain.py")
    monkeypatch.setenv("MEGABATCH_CACHE", str(tmp_path / "cache"))
    assert run(module.chain, ["--local", "--run_dir", "both"]) == 0, capsys.readouterr()
    said = (RunDirectory(Path("both/tokens")).rank_log(0, 0)).read_text()
    [made] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert str(made) in said and "12 steps" in said  # 200 // 16
    log = RunDirectory(Path("both/train")).rank_log(0, 0).read_text()
    assert str(made) in log and "tokenising" not in log


def test_a_missing_input_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = chain_of(tmp_path, shell("makes", "true", outputs=["number"]), READS)
    assert command(chain, "--local") == 2
    assert f"input missing: {tmp_path}/demo/makes/number" in capsys.readouterr().out
    assert waited(chain)["reads"] == ("failed", "failed")


def test_a_dry_run_shows_graph_and_scripts_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(failing(tmp_path), "--dry_run") == 0
    shown = capsys.readouterr()
    assert shown.out.count("#!/bin/bash\n") == 6 and "breaks not ok" in shown.err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert megabatch(["chain", "show", str(tmp_path)]) == 1
    assert "holds no chain" in capsys.readouterr().err


def test_a_checkpoint_is_chosen_once(tmp_path: Path) -> None:
    """A run that comes back reads what it read at first, although its input's maker has saved again since."""
    from megabatch.chain.local import fix_inputs
    from megabatch.slurm.job import Input, JobSpec

    run_, reader = tmp_path / "train", tmp_path / "reader"
    for step in ("step_00000001", "step_00000002"):
        (run_ / "checkpoints" / step / "hf").mkdir(parents=True)
    job = JobSpec(
        name="x", run_directory=reader, inputs=(Input(reader / "inputs/train/hf", run_, reader / "inputs/train"),)
    )
    reader.mkdir()
    assert f"megabatch: input missing: {run_}/checkpoints/latest\n" in fix_inputs(job)
    for latest in ("step_00000001\n", "step_00000002\n"):
        (run_ / "checkpoints" / "latest").write_text(latest)
        assert not fix_inputs(job)
        assert (reader / "inputs" / "train").resolve().name == "step_00000001"
    (run_ / "checkpoints" / "step_00000001" / "hf").rmdir()
    assert fix_inputs(job) == f"megabatch: input missing: {reader}/inputs/train/hf\n"
    (reader / "inputs" / "train").unlink()
    (run_ / "checkpoints" / "latest").write_text("step_00000003\n")  # killed before the folder was there
    assert not fix_inputs(job)
    assert (reader / "inputs" / "train").resolve().name == "step_00000002"
