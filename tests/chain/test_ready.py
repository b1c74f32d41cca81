"""Faults of the steps before anything is queued, and what earlier steps make counted as there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megabatch import (
    Batch,
    Chain,
    Checkpoint,
    Command,
    ConversionRequest,
    Convert,
    Data,
    Model,
    Parallel,
    Recipe,
    Resources,
    Role,
    Step,
    Training,
    ok,
    output,
)
from megabatch.chain.flags import parsed
from megabatch.chain.ready import ReadyChain, make_ready
from megabatch.config.flags import Actions
from megabatch.converters.command.flags import Flags, parse
from megabatch.errors import ConfigError
from megabatch.slurm.container import mounted
from megabatch.slurm.job import Input
from megabatch.slurm.profile import ClusterProfile, Container

from .conftest import SMALL, chain_of, shell

MADE = Model(
    model_type="qwen3",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    padded_vocab_size=512,
    max_position_embeddings=256,
    torch_dtype="float32",
)
FIRST = Recipe(
    name="first",
    task="sft",
    model=MADE,
    data=Data(dataset=["example:arithmetic#16"], max_length=64),
    batch=Batch(micro_batch_size=1, global_batch_size=4),
    training=Training(train_iters=2),
    parallel=Parallel(distributed_backend="gloo"),
    resources=Resources(gpus_per_node=0, tasks_per_node=2, time="1:00:00"),
)
TO_MCORE = ConversionRequest(to_mcore=True, model="x")
CONTAINED = ClusterProfile(container=Container(image="image.sif", runtime="apptainer"))
SERVER = Role(name="server", command=["python", "serve.py"], nodes=2)


def ready(chain: Chain, **actions: object) -> ReadyChain:
    return make_ready(chain, Actions(**({"submit": True} | actions)), file=Path(__file__))  # type: ignore[arg-type]


def faults(chain: Chain, **actions: object) -> str:
    with pytest.raises(ConfigError) as caught:
        ready(chain, **actions)
    return str(caught.value)


def two_stages(folder: Path, second: Recipe) -> Chain:
    convert = Step("convert", Convert(ConversionRequest(to_mcore=True, model=output("first").hf)), after=ok("first"))
    return chain_of(folder, Step("first", FIRST), convert, Step("second", second, after=ok("convert")))


SECOND = replace(
    FIRST,
    name="second",
    model=Model(model=output("first").hf),
    checkpoint=Checkpoint(load=output("convert").mcore, finetune=True),
)


def test_a_model_that_an_earlier_step_makes_is_checked_by_its_shape(tmp_path: Path) -> None:
    got = ready(two_stages(tmp_path, SECOND))
    [first, convert, second] = got.steps
    assert second.shape == convert.shape == first.shape is not None
    folder = tmp_path / "demo"
    assert second.job.inputs == (
        Input(folder / "second/inputs/first/hf", folder / "first", folder / "second/inputs/first"),
        Input(folder / "convert/output"),
    )
    assert {folder / "first", folder / "convert/output"} <= {*mounted(second.job, CONTAINED)}
    assert second.launch is not None
    config = second.launch.config(provenance={})
    assert config.recipe.model.model == str(folder / "second/inputs/first/hf")
    assert config.recipe.checkpoint.load == str(folder / "convert/output")
    wrong = replace(SECOND, parallel=replace(SECOND.parallel, tensor_model_parallel_size=3))
    said = faults(two_stages(tmp_path, wrong))
    assert "second: parallel.tensor_model_parallel_size=3" in said and "num_attention_heads=4" in said


def test_faults_of_all_steps_are_told_at_once(tmp_path: Path) -> None:
    bad = chain_of(
        tmp_path,
        Step("train", replace(FIRST, batch=Batch(micro_batch_size=3, global_batch_size=4))),
        Step(
            "both", Convert(ConversionRequest(to_mcore=True, to_hf=True, model="x", mcore_model="y"), resources=SMALL)
        ),
        Step("gone", Convert(ConversionRequest(to_mcore=True, model=str(tmp_path / "nowhere")), resources=SMALL)),
        Step("time", Command(["true"], resources=replace(SMALL, time="soon"))),
        Step("words", Command("true")),
        Step("role", Command(["true"], roles=[Role(name="Big", command=["x"])], resources=SMALL)),
        shell("fine", "true"),
    )
    said = faults(bad)
    assert "train: batch." in said
    assert "both: --to_mcore and --to_hf exclude each other" in said
    assert f"gone: {tmp_path}/nowhere" in said
    assert "time: resources.time='soon' must be minutes" in said
    assert "words: argv must be a list" in said
    assert "role: roles['Big'].name" in said
    assert "fine" not in said
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_conversion_runs_the_command_with_all_that_was_asked_for(tmp_path: Path) -> None:
    request = replace(TO_MCORE, model="org/model", adapters=["a", Path("b")], merge_lora=True, layer_keys="per_layer")
    step = Step("convert", Convert(request, workers=3, verify=True, resources=SMALL))
    [ready_step] = ready(chain_of(tmp_path, step), submit=False, dry_run=True).steps
    job = ready_step.job
    assert job.command[1:4] == ("-P", "-m", "megabatch.converters.command")
    adapters = tuple(str(Path(name).absolute()) for name in "ab")
    assert parse(job.command[4:]) == Flags(
        request=replace(request, adapters=adapters),
        output_dir=str(tmp_path / "demo" / "convert" / "output"),
        resume=True,
        workers=3,
        verify=True,
    )


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (Command(["serve", "--api-key=hunter2xyz"], resources=SMALL), "argv holds a value for api-key"),
        (Command(["serve", "--password", "hunter2xyz"], resources=SMALL), "argv holds a value for password"),
        (Command(["bash", "-c", "DB_PASS=hunter2xyz ./x"], resources=SMALL), "argv holds a value for DB_PASS"),
        (Command("serve --token=hunter2xyz", resources=SMALL), "argv must be a list"),  # type: ignore[arg-type]
        (Command(["x"], environment={"X": "Authorization: Bearer hunter2xyz"}, resources=SMALL), "environment.X"),
        (Command(["x"], environment={"OPENAI_KEY": "hunter2xyz"}, resources=SMALL), "environment.OPENAI_KEY"),
        (
            Command(["x"], roles=[Role(name="s", command=["y", "--token=hunter2xyz"])], resources=SMALL),
            "roles['s'].command holds a value for token",
        ),
    ],
)
@pytest.mark.parametrize("start", [{}, {"submit": False, "local": True}])
def test_a_secret_of_a_command_is_refused_and_not_shown(
    tmp_path: Path, command: Command, place: str, start: dict[str, bool]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ready(chain_of(tmp_path, Step("leaky", command)), **start)
    assert "leaky: " in str(caught.value) and place in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_what_is_missing_here_alone_is_a_remark_of_a_dry_run(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, Step("train", replace(FIRST, data=replace(FIRST.data, dataset=["away.jsonl"]))))
    assert "away.jsonl" in faults(chain)
    [refusal] = ready(chain, submit=False, dry_run=True).refusals
    assert str(refusal).startswith("train: data.dataset") and "away.jsonl" in str(refusal)


def test_a_model_of_unknown_shape_cannot_be_trained(tmp_path: Path) -> None:
    download = Step("download", Command(["x"], outputs=("model",), resources=SMALL))
    train = replace(FIRST, model=Model(model=output("download").file("model")))
    said = faults(chain_of(tmp_path, download, Step("train", train, after=ok("download"))))
    assert "train: model.model is made by a step whose model's shape is not known" in said


def test_jobs_of_commands_and_links(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        Step("train", FIRST, links=3),
        Step("python", Command(["python", "x.py"], inherit=["HF_TOKEN"], resources=SMALL), after=ok("train")),
        Step("other", Command(["./x"], environment={"A": "1"}, roles=[SERVER], resources=SMALL)),
    )
    train, python, other = (step.job for step in ready(chain).steps)
    assert (train.links, train.requeue, train.name) == (3, False, "demo-train")
    assert python.command[1:] == ("x.py",) and python.inherit == ("HF_TOKEN",)
    assert other.command == ("./x",) and other.environment == {"A": "1"} and other.hang_timeout_s == 0
    assert other.working_directory == tmp_path and (other.roles, other.total_nodes) == ((SERVER,), 3)


def test_flags_of_steps(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, Step("train", FIRST), shell("after", "true", ok("train")))
    actions, changed = parsed(chain, ["--local", "--train.train_iters", "7"])
    assert actions.local and changed.steps[0].work.training.train_iters == 7  # type: ignore[union-attr]
    for words, says in (
        (["--train_iters", "7"], "--train_iters needs the name of a training step; try --train.train_iters"),
        (["--train.train_itres", "7"], "--train.train_itres is not a parameter; try --train.train_iters"),
        (["--trian.train_iters=7"], "--trian.train_iters names no step of this chain; try --train.train_iters"),
        (["--x.lr", "1"], "--x.lr names no step of this chain; the training steps are train"),
        (["--training.train_iters", "7"], "the name of a training step; try --train.training.train_iters"),
        (["--train_itres", "7"], "--train_itres is not a parameter; try --train.train_iters"),
        (["--submt"], "--submt is not a parameter; try --submit"),
        (["--after.train_iters", "7"], "--after.train_iters names a step that takes no flags: only training steps do"),
        (["--train.lr", "x"], "train: learning_rate.lr='x' must be a number"),
        (["--train.submit"], "takes parameters, not actions"),
        (["--submit", "--local"], "exclude each other"),
        (["--chain", "3"], "links"),
        (["local"], "local is not a flag"),
    ):
        with pytest.raises(ConfigError) as caught:
            parsed(chain, words)
        assert says in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parsed(chain, ["--submit", "--cluster", "--trian.lr", "1", "--train.lrr", "1"])
    assert [fault.field for fault in caught.value.faults] == ["--trian.lr", "--cluster", "--train.lrr"]


def test_flags_of_a_step_whose_name_has_dots(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, Step("train", FIRST), Step("train.long-er", FIRST))
    actions, changed = parsed(chain, ["--train.long-er.train_iters=7", "--run_dir=/a.b/c"])
    assert [step.work.training.train_iters for step in changed.steps] == [2, 7]  # type: ignore[union-attr]
    assert actions.run_dir == "/a.b/c"


def test_the_example_is_ready_with_the_jobs_it_says(tmp_path: Path) -> None:
    from megabatch.cli.recipe_file import load_recipe

    file = Path(__file__).parents[2] / "recipes" / "chains" / "quickstart_chain.py"
    chain = load_recipe(file)()
    got = make_ready(chain, Actions(run_dir=str(tmp_path / "run")), file=file)  # type: ignore[arg-type]
    assert [step.step.name for step in got.steps] == ["first", "convert", "second", "export", "compare", "report"]
    assert not got.refusals
    scripts = {step.step.name: got.script(step) for step in got.steps}
    assert all(script.startswith("#!/bin/bash\n") for script in scripts.values())
    assert "megabatch.converters.command --to_hf --model " in scripts["export"]
