"""Bad input that is seen before a run is queued, each with its place and a fix."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from megabatch import Batch, Bridge, Checkpoint, Grpo, Model, Recipe, Rewards, Rlhf, Rollout, Tuner
from megabatch.config.flags import Actions
from megabatch.converters.adapters.targets import find_targets
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.families import family_named
from megabatch.converters.safetensors_io import Writer
from megabatch.entry.input_checks import damaged_inputs, in_the_way, missing_inputs, occupied, unwritable
from megabatch.entry.launch import prepare
from megabatch.entry.launch_checks import missing_here
from megabatch.entry.model import find_model
from megabatch.rollout.vllm.engine_options import installed
from megabatch.slurm.profile import ClusterProfile


def _faults(recipe: Recipe) -> list[str]:
    model = find_model(recipe)
    return [str(fault) for fault in (*missing_inputs(recipe, model), *damaged_inputs(recipe, model))]


def _data(recipe: Recipe, *paths: object) -> Recipe:
    return replace(recipe, data=replace(recipe.data, dataset=[str(path) for path in paths]))


def test_good_input_has_no_fault(recipe: Recipe, tmp_path: Path) -> None:
    assert _faults(recipe) == []
    assert unwritable(tmp_path / "a" / "b") == []
    assert _faults(_data(recipe, "example:arithmetic#7", "org/on-the-hub#5")) == []


def test_a_missing_dataset_names_the_nearest(recipe: Recipe, dataset: Path) -> None:
    (fault,) = _faults(_data(recipe, dataset.with_name("trian.jsonl")))
    assert fault.startswith("data.dataset: ") and "does not exist" in fault and "train.jsonl" in fault


def test_what_is_missing_in_the_working_directory_is_told_with_its_folder(
    recipe: Recipe, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = dataset.parent / "empty"
    (empty / "tiny-model").mkdir(parents=True)
    monkeypatch.chdir(empty)
    asked = _data(replace(recipe, model=replace(recipe.model, model="tiny_model")), "nothere.jsonl")
    data, model = _faults(asked)[:2]
    kinds = ".jsonl, .json, .csv, .tsv, .parquet, .txt (the text ones also with .gz or .zst)"
    assert data == f"data.dataset: dataset 'nothere.jsonl' does not exist; {empty} has no {kinds} file; check the path"
    assert model == f"model.model='tiny_model' does not exist; nearest in {empty}: tiny-model"
    (empty / "not_here.jsonl").touch()
    assert _faults(asked)[0].endswith(f"does not exist; nearest in {empty}: not_here.jsonl")


def test_each_missing_dataset_is_named(recipe: Recipe, tmp_path: Path) -> None:
    assert len(_faults(_data(recipe, tmp_path / "a.jsonl", tmp_path / "b.csv"))) == 2


def test_a_batch_of_more_rows_than_there_are(recipe: Recipe, dataset: Path) -> None:
    rows = len(dataset.read_text().splitlines())
    asked = replace(recipe, batch=replace(recipe.batch, global_batch_size=rows + 1))
    (fault,) = _faults(asked)
    assert fault.startswith(f"batch.global_batch_size={rows + 1} is more than the {rows} rows of data.dataset")
    assert _faults(_data(asked, dataset, dataset)) == _faults(_data(asked, f"{dataset}#{rows + 1}")) == []
    assert _faults(_data(asked, dataset, "org/on-the-hub")) == []


def test_an_empty_dataset(recipe: Recipe, dataset: Path) -> None:
    dataset.write_text("")
    assert "is empty" in _faults(recipe)[0]
    dataset.write_text("\n\n")
    assert "holds no rows" in _faults(recipe)[0]


def test_a_malformed_line_is_named_by_its_number(recipe: Recipe, dataset: Path) -> None:
    lines = ['{"question": "1 + 1?", "answer": "2"}'] * 5000
    lines[4710] = lines[4710][:-3]
    dataset.write_text("\n".join(lines))
    (fault,) = _faults(recipe)
    assert f"{dataset}:4711" in fault


def test_an_unknown_example(recipe: Recipe) -> None:
    assert "example:arithmetic" in _faults(_data(recipe, "example:arithmetics"))[0]


def test_a_missing_model_folder_names_the_nearest(recipe: Recipe, model_folder: Path) -> None:
    (fault,) = _faults(replace(recipe, model=Model(model=str(model_folder.with_name("tiny-qwen")))))
    assert "does not exist" in fault and "tiny-qwen3" in fault


def test_a_model_of_unknown_shape_says_how_to_get_it(recipe: Recipe) -> None:
    (fault,) = _faults(replace(recipe, model=Model(model="org/name")))
    assert "modelscope download --model org/name" in fault


def test_a_model_folder_without_tokenizer(recipe: Recipe, model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    (fault,) = _faults(recipe)
    assert "tokenizer.json" in fault
    other = replace(recipe.model, tokenizer=str(model_folder.parent))
    assert str(model_folder.parent) in _faults(replace(recipe, model=other))[0]


def test_cut_off_weights(recipe: Recipe, model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (fault,) = _faults(recipe)
    assert fault.startswith("model.model: ") and "model.safetensors" in fault


def test_names_of_what_is_trained_must_be_the_models(recipe: Recipe) -> None:
    shape = find_model(recipe)
    for fields, message in (
        (
            {"tuner_type": "lora", "target_modules": ("linear_qvk",)},
            "tuner.target_modules: 'linear_qvk' is the end of no",
        ),
        ({"tuner_type": "lora", "target_regex": "x.*"}, "tuner.target_regex: 'x.*' matches no layer"),
        ({"tuner_type": "lora", "modules_to_save": ("lm_haed",)}, "tuner.modules_to_save: 'lm_haed' is the end of no"),
        ({"freeze_parameters": ("decoder.layer.0",)}, "tuner.freeze_parameters: no parameter's name begins with"),
        ({"freeze_parameters_ratio": 1.0}, "tuner.freeze_parameters: nothing is left to train"),
    ):
        (fault,) = missing_inputs(replace(recipe, tuner=replace(recipe.tuner, **fields)), shape)
        assert str(fault).startswith(message)
    assert missing_inputs(replace(recipe, tuner=replace(recipe.tuner, tuner_type="lora")), shape) == []


def test_an_adapter_of_another_model_or_rank_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    tuned = replace(recipe, tuner=replace(recipe.tuner, tuner_type="lora", lora_rank=4, lora_alpha=8))
    shape = find_model(recipe).shape
    assert shape is not None
    table = family_named(shape.model_type).tensors(shape)
    targets = find_targets(table, ["all-linear"], rank=2)
    folder = tmp_path / "adapter"
    folder.mkdir()
    shapes = {name: dims for target in targets for name, dims in target.peft_shapes().items()}
    with Writer(folder / "adapter_model.safetensors", {n: TensorInfo("F32", d) for n, d in shapes.items()}) as writer:
        for name, dims in shapes.items():
            writer.write(name, bytes(4 * dims[0] * dims[1]))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj",
              "gate_proj", "up_proj", "down_proj"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    given = replace(tuned, bridge=replace(tuned.bridge, adapters=(str(folder),)))
    (fault,) = missing_inputs(given, find_model(given))
    assert "has rank 2 in model.layers.0" in str(fault) and "lora_rank is 4; try 2" in str(fault)
    fitting = replace(given, tuner=replace(given.tuner, lora_rank=2))
    assert missing_inputs(fitting, find_model(fitting)) == []
    other = replace(fitting, tuner=replace(fitting.tuner, target_modules=("linear_qkv",)))
    (fault,) = missing_inputs(other, find_model(other))
    assert "adapts model.layers.0.mlp.down_proj.weight" in str(fault) and "which the run does not" in str(fault)


def test_load_must_be_a_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = replace(recipe, checkpoint=Checkpoint(load=str(folder)))
    assert _faults(asked)[0].startswith(f"checkpoint.load: there is no folder {folder}")
    folder.mkdir()
    assert "holds no checkpoint" in _faults(asked)[0]
    lenient = replace(recipe, checkpoint=Checkpoint(load=str(folder), exit_on_missing_checkpoint=False))
    assert _faults(lenient) == []
    step = folder / "checkpoints" / "step_00000001"
    (step / "mcore").mkdir(parents=True)
    assert "is damaged: mcore/.metadata: is missing" in _faults(lenient)[0], "it is there, and cannot be loaded"
    (step / "mcore" / ".metadata").touch()
    (step / "trainer.json").touch()
    assert _faults(asked) == []


def test_a_checkpoint_to_load_has_the_sizes_of_the_model(recipe: Recipe, model_folder: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    (step / "mcore").mkdir(parents=True)
    (step / "mcore" / ".metadata").touch()
    (step / "trainer.json").touch()
    config = json.loads((model_folder / "config.json").read_text())
    (step / "hf").mkdir()
    asked = replace(recipe, checkpoint=Checkpoint(load=str(step)))
    for changes, said in (
        ({"vocab_size": 40}, ""),
        ({"hidden_size": 16, "num_hidden_layers": 3},
         "num_layers is 3 in it and 1 in the model, hidden_size is 16 in it and 8 in the model"),
    ):  # fmt: skip
        (step / "hf" / "config.json").write_text(json.dumps(config | changes))
        expected = [f"checkpoint.load={str(step)!r} is a checkpoint of another model: {said}"] if said else []
        assert _faults(asked) == expected


def test_a_run_that_goes_on_has_steps_left(recipe: Recipe, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_00000004"
    (step / "mcore").mkdir(parents=True)
    (step / "mcore" / ".metadata").touch()
    (step / "trainer.json").write_text('{"step": 4}')
    for train_iters, finetune, left in ((3, False, False), (4, False, False), (5, False, True), (3, True, True)):
        asked = replace(recipe, checkpoint=Checkpoint(load=str(step), finetune=finetune))
        found = _faults(replace(asked, training=replace(recipe.training, train_iters=train_iters, max_epochs=None)))
        rule = f"goes on from step 4, and training.train_iters={train_iters} leaves it none; raise train_iters"
        assert left == (found == []) and all(f"checkpoint.load={str(step)!r} {rule}" in fault for fault in found)


def test_a_run_that_goes_on_draws_its_data_in_the_same_order(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = run / "checkpoints" / "step_00000001"
    (step / "mcore").mkdir(parents=True)
    (step / "mcore" / ".metadata").touch()
    (step / "trainer.json").write_text('{"step": 1}')
    seed = recipe.training.seed
    for old, shuffled, said in (
        (seed, True, ""),
        (seed + 1, True, f"a run with training.seed={seed + 1}, whose place in the data seed={seed} orders otherwise"),
        (seed, False, "a run with data.dataset_shuffle=False, whose place in the data dataset_shuffle=True orders"),
    ):
        saved = {"training": {"seed": old}, "data": {"dataset_shuffle": shuffled}}
        (run / "run.json").write_text(json.dumps({"recipe": saved}))
        found = _faults(replace(recipe, checkpoint=Checkpoint(load=str(run))))
        assert len(found) == bool(said) and all(said in fault for fault in found), found
        assert _faults(replace(recipe, checkpoint=Checkpoint(load=str(run), finetune=True))) == []


def test_an_output_layer_that_differs_from_the_embedding_it_is_tied_to(recipe: Recipe, model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    tensors = {name: array + 0 for name, array in load_file(model_folder / "model.safetensors").items()}
    (model_folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, model_folder / "model.safetensors")
    assert _faults(recipe) == []
    tensors["lm_head.weight"] += 1
    save_file(tensors, model_folder / "model.safetensors")
    (fault,) = _faults(recipe)
    assert (
        "lm_head.weight differs from model.embed_tokens.weight though config.json has tie_word_embeddings=t" in fault
    )


def test_adapters_alone_are_no_model_to_load(recipe: Recipe, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    (step / "mcore").mkdir(parents=True)
    for name in (".metadata", "adapter_config.json"):
        (step / "mcore" / name).touch()
    (step / "trainer.json").touch()
    (fault,) = _faults(replace(recipe, checkpoint=Checkpoint(load=str(tmp_path / "run"))))
    assert "is a checkpoint of adapters alone; name it in tuner.adapter_load" in fault


def test_the_state_of_another_optimizer_is_seen_before_the_queue(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = run / "checkpoints" / "step_00000001"
    (step / "mcore").mkdir(parents=True)
    (step / "mcore" / ".metadata").touch()
    (step / "trainer.json").touch()
    (run / "run.json").write_text(json.dumps({"recipe": {"optimizer": {"optimizer": "muon"}}}))
    for load in (run, step):
        (fault,) = _faults(replace(recipe, checkpoint=Checkpoint(load=str(load))))
        assert f"checkpoint.load={str(load)!r} is a checkpoint of a run with optimizer='muon', whose state" in fault
        assert "optimizer.optimizer='adam' cannot go on from; set no_load_optim=True" in fault
        for fine in ({"no_load_optim": True}, {"finetune": True}):
            assert _faults(replace(recipe, checkpoint=Checkpoint(load=str(load), **fine))) == []
    for text in ('{"recipe": {"optimizer": {"optimizer": "adam"}}}', "{", "[]"):
        (run / "run.json").write_text(text)
        assert _faults(replace(recipe, checkpoint=Checkpoint(load=str(run)))) == []


def test_a_run_starts_from_an_adapter_and_no_model(recipe: Recipe, model_folder: Path) -> None:
    tuned = replace(recipe, tuner=Tuner(tuner_type="lora"), bridge=Bridge(adapters=(str(model_folder),)))
    said = f"bridge.adapters: {model_folder} is the folder of a Hugging Face model, not an adapter; name it as --model"
    assert _faults(tuned) == [said]


def test_a_checkpoint_of_another_program_gives_weights_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mcore").mkdir()
    (tmp_path / "mcore" / ".metadata").touch()
    load = str(tmp_path / "mcore")
    assert "set checkpoint.finetune=True" in _faults(replace(recipe, checkpoint=Checkpoint(load=load)))[0]
    assert _faults(replace(recipe, checkpoint=Checkpoint(load=load, finetune=True))) == []


def test_a_run_directory_below_a_file(dataset: Path) -> None:
    for run in (dataset, dataset / "run", dataset / "a" / "run"):
        said = f"run directory='{run}' cannot be written: {dataset} is a file; choose another folder"
        assert [str(fault).partition(" with")[0] for fault in unwritable(run)] == [said]
        assert in_the_way(run) == unwritable(run)


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


@pytest.fixture
def world_readable() -> Iterator[Path]:
    """A folder that other users can enter; pytest's own lie in one that they cannot."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_run_directory_that_cannot_be_written(world_readable: Path) -> None:
    """As another user, since root may write everywhere."""
    for name in ("open/run/logs", "closed", "hidden/below"):
        (world_readable / name).mkdir(parents=True, mode=0o755)
    (world_readable / "hidden").chmod(0o700)
    (world_readable / "open").chmod(0o777)
    (world_readable / "open" / "run").chmod(0o777)
    blocked = [
        (world_readable / "closed" / "v0", world_readable / "closed"),
        (world_readable / "hidden" / "below" / "v0", world_readable / "hidden"),
        (world_readable / "open" / "run", world_readable / "open" / "run" / "logs"),
    ]

    runs = [world_readable / "open" / "v0", *(run for run, _ in blocked)]
    with ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=_become_nobody) as nobody:
        found = [str(fault) for faults in nobody.map(unwritable, runs) for fault in faults]
    fix = "is not writable for you; choose another folder with --save or --run_dir"
    assert found == [f"run directory='{run}' cannot be written: {folder} {fix}" for run, folder in blocked]
    assert not any(in_the_way(run) for run, _ in blocked)


@pytest.mark.parametrize("name", ["train.jsonl#0"])
def test_zero_rows_asked_for(recipe: Recipe, tmp_path: Path, name: str) -> None:
    assert "#0" in _faults(_data(recipe, tmp_path / name))[0]


def test_a_folder_with_other_files_is_nobodys_run_directory(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert occupied(folder) == []
    for name in ("code", "logs", "slurm", "v0-20260102-030405", ".git"):
        (folder / name).mkdir(parents=True)
    (folder / "job.sbatch").touch()
    assert occupied(folder) == []
    for name in ("thesis.tex", "b", "c", "d"):
        (folder / name).touch()
    (fault,) = occupied(folder)
    assert str(fault) == (
        f"run directory='{folder}' holds no run, but b, c, d and 1 more; "
        "choose an empty or a new folder with --run_dir"
    )
    (folder / "d").unlink()
    (fault,) = occupied(folder, own=["b", "c"])
    assert "holds no run, but thesis.tex;" in str(fault)
    for name in ("run.json", "sweep.json", "chain.json"):
        (folder / name).touch()
        assert occupied(folder) == []
        (folder / name).unlink()


ROWS = """
def tidy(row):
    return {"query": row["question"], "response": row["answer"]}

def blank(row):
    return {"response": "no question"}

def late(row):
    return row["answers"]
"""


def test_a_function_for_rows_is_tried_before_the_queue(recipe: Recipe, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(ROWS)
    dataset.write_text('{"question": "1 + 1?", "answer": "2", "messages": 5}\n' * 3)  # fewer than a batch, and odd

    def found(name: str) -> str:
        made = replace(recipe, data=replace(recipe.data, preprocess=f"{tmp_path / 'rows.py'}:{name}"))
        return "\n".join(map(str, damaged_inputs(made, find_model(made))))

    assert found("tidy") == ""
    assert "train.jsonl:1: data.preprocess late failed at rows.py:9: KeyError: 'answers'" in found("late")
    assert "train.jsonl:1" in found("blank")
    assert found("missing") == "", "the checks of own code tell it"
    misspelt = replace(recipe, data=replace(recipe.data, preprocess=str(tmp_path / "rows.py:tdy")))
    launch = prepare(misspelt, Actions(local=True), recipe_file=tmp_path / "recipe.py")
    [fault] = [str(fault) for fault in missing_here(launch, local=True) if fault.field == "data.preprocess"]
    assert "cannot be used" in fault and "has no function tdy; did you mean tidy?" in fault


def test_vllm_inside_the_ranks_is_looked_for_before_the_queue(recipe: Recipe, tmp_path: Path) -> None:
    """Where the ranks run this Python; another one may have it."""
    (tmp_path / "recipe.py").write_text("")
    made = replace(
        recipe, task="rlhf", rlhf=Rlhf(rlhf_type="grpo"), grpo=Grpo(reward_funcs=["format"]),
        rollout=Rollout(vllm_mode="colocate"),
    )  # fmt: skip

    def found(profile: ClusterProfile, *, local: bool) -> list[str]:
        launch = replace(prepare(made, Actions(local=local), recipe_file=tmp_path / "recipe.py"), profile=profile)
        faults = missing_here(launch, local=local)
        return [str(fault) for fault in faults if fault.field == "rollout.vllm_mode"]

    fault = "rollout.vllm_mode='colocate' needs vLLM beside the trainer: vLLM is not installed; pip install"
    expected = [] if installed() else [fault]
    for local in (True, False):
        assert [one[: len(fault)] for one in found(ClusterProfile(), local=local)] == expected
    assert found(ClusterProfile(python="/elsewhere/bin/python"), local=False) == []


def test_variables_that_no_chat_template_mentions_are_refused(recipe: Recipe) -> None:
    def faults(**data: Any) -> list[str]:
        return _faults(replace(recipe, data=replace(recipe.data, **data)))

    assert recipe.model.model is not None
    folder = Path(recipe.model.model)
    rule = "gives the chat template enable_thinking, which it does not read; leave it out"
    assert faults(enable_thinking=False) == [f"data.enable_thinking=False {rule}"]
    (folder / "chat_template.jinja").write_text("{% if enable_thinking %}{% endif %}")
    assert faults(enable_thinking=False) == []
    assert faults(enable_thinking=False, template="chatml") == [f"data.enable_thinking=False {rule}"]
    (fault,) = faults(chat_template_kwargs={"enable_thinkin": 1})
    assert fault.startswith("data.chat_template_kwargs=1 gives the chat template enable_thinkin, which")


REWARDS = """
def leveled(completions, level, solution="", **columns):
    return [0.0 for _ in completions]
def plain(prompts, completions, completion_ids, response_token_ids, messages, truncated):
    return [0.0 for _ in completions]
def by_turns(completions, turns, environment_reward):
    return [0.0 for _ in completions]
def of_outputs(outputs, level):
    return [0.0 for _ in outputs]
"""


def test_a_reward_that_reads_a_column_which_no_row_has(recipe: Recipe, tmp_path: Path) -> None:
    """Only where every row was looked at; a column that one row of any dataset has is None for the others."""
    mine = tmp_path / "mine.py"
    mine.write_text(REWARDS)
    (tmp_path / "environment.py").write_text("class Env:\n    def step(self, messages, **more):\n        return {}\n")
    (tmp_path / "rows.py").write_text("def tidy(row):\n    return row\n")

    def faults(*rows: dict[str, Any], funcs: Sequence[str] = ("mine.py:leveled",), **groups: dict[str, Any]) -> str:
        data = tmp_path / "asked.jsonl"
        data.write_text("".join(json.dumps({"query": "1+1?", **row}) + "\n" for row in rows or ({},)))
        grpo = {"reward_funcs": [text.replace("mine.py", str(mine)) for text in funcs], "num_generations": 2}
        made = replace(
            recipe, task="rlhf", rlhf=Rlhf(rlhf_type="grpo"), batch=Batch(global_batch_size=2),
            data=replace(recipe.data, dataset=[str(data)], **groups.get("data", {})),
            grpo=Grpo(**grpo | groups.get("grpo", {})), rollout=Rollout(**groups.get("rollout", {})),
            rewards=Rewards(**groups.get("rewards", {})),
        )  # fmt: skip
        return "\n".join(map(str, damaged_inputs(made, find_model(made))))

    rule = "takes the argument level, and no row of the data has it: rows have"
    assert faults({"source": "made"}) == f"grpo.reward_funcs={str(mine) + ':leveled'!r} {rule} source"
    assert faults({"level": None}).endswith(f"{rule} no other columns")
    assert not faults({}, {"level": 3}) and not faults(funcs=["mine.py:plain", "format"])
    (tmp_path / "other.jsonl").write_text('{"query": "2+2?", "level": 1}\n')
    for more in (
        {"val_dataset": [str(tmp_path / "other.jsonl")]},
        {"columns": {"difficulty": "level"}},
        {"preprocess": f"{tmp_path}/rows.py:tidy"},
        {"val_dataset": ["example:arithmetic#2"]},
    ):
        assert not faults({"difficulty": 1}, data=more), more
    environment: dict[str, Any] = {"multi_turn_scheduler": f"{tmp_path}/environment.py:Env", "max_turns": 2}
    assert not faults(funcs=["mine.py:by_turns"], rollout=environment)
    assert "takes the argument turns, and no row" in faults(funcs=["mine.py:by_turns"])
    plugged = {"reward_model": ["org/scores"], "reward_model_plugin": [f"{mine}:of_outputs"]}
    assert f"grpo.reward_model_plugin={str(mine) + ':of_outputs'!r} {rule}" in faults(funcs=[], grpo=plugged)


@pytest.mark.parametrize(
    ("reward", "column", "rule"),
    [
        ("accuracy", "response", "needs the column solution"),
        ("cosine", "solution", "needs the column solution"),
        ("code", "input_output", "needs the column tests or input_output"),
        ("judge", "hint", "sends judge_prompt with {hint}"),
    ],
)
def test_a_shipped_reward_without_its_column(
    reward: str, column: str, rule: str, recipe: Recipe, tmp_path: Path
) -> None:
    data = tmp_path / "asked.jsonl"
    made = replace(
        recipe, task="rlhf", rlhf=Rlhf(rlhf_type="grpo"), batch=Batch(global_batch_size=2),
        data=replace(recipe.data, dataset=[str(data)]), grpo=Grpo(reward_funcs=[reward], num_generations=2),
        rewards=Rewards(judge_base_url="http://h:1", judge_model="m", judge_prompt='{prompt}{completion}{hint}{"a"}'),
    )  # fmt: skip
    data.write_text('{"query": "1+1?"}\n')
    (fault,) = damaged_inputs(made, find_model(made))
    assert str(fault).startswith(f"grpo.reward_funcs={reward!r} {rule}, and no row of the data has it: rows have")
    assert not damaged_inputs(made, find_model(made), has_all_data=False)
    data.write_text(json.dumps({"query": "1+1?", column: "2"}) + "\n")
    assert not damaged_inputs(made, find_model(made))
