"""Flags: spellings, values, aliases and clear errors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megabatch.config.declare import parameters
from megabatch.config.flags import parse
from megabatch.config.foreign_names import OF_THE_CLUSTER, OTHERWISE, QLORA, WITHOUT
from megabatch.config.help import help_text
from megabatch.config.model import Model
from megabatch.config.moe import MoE
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError


def faults(line: str, recipe: Recipe) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(line.split(), recipe)
    return [str(fault) for fault in error.value.faults]


@pytest.mark.parametrize(
    ("line", "group", "name", "value"),
    [
        ("--tensor_model_parallel_size 4", "parallel", "tensor_model_parallel_size", 4),
        ("--parallel.tensor_model_parallel_size=4", "parallel", "tensor_model_parallel_size", 4),
        ("--tensor-model-parallel-size 4", "parallel", "tensor_model_parallel_size", 4),
        ("--sequence_parallel", "parallel", "sequence_parallel", True),
        ("--sequence_parallel true --lr 1", "parallel", "sequence_parallel", True),
        ("--sequence_parallel=false", "parallel", "sequence_parallel", False),
        ("--eval_iters -1", "evaluation", "eval_iters", -1),
        ("--lr 1e-5", "learning_rate", "lr", 1e-5),
        ("--dataset a.jsonl#500 b.jsonl --lr 1", "data", "dataset", ("a.jsonl#500", "b.jsonl")),
        ("--dataset=a.jsonl", "data", "dataset", ("a.jsonl",)),
        ("--recompute_granularity none", "recompute", "recompute_granularity", "none"),
        ("--train_iters None", "training", "train_iters", None),
        ('--megatron_extra_kwargs {"a":1}', "training", "megatron_extra_kwargs", {"a": 1}),
        ("--output_dir out", "checkpoint", "save", "out"),
        ("--save_steps 7", "checkpoint", "save_interval", 7),
        ("--checkpoint.save_steps 7", "checkpoint", "save_interval", 7),
        ("--num_train_epochs 2", "training", "max_epochs", 2),
        ("--dataloader_num_workers 0", "data", "num_workers", 0),
        ("--mcore_model old", "checkpoint", "load", "old"),
        ("--train_type full", "tuner", "tuner_type", "full"),
        ("--extra_megatron_kwargs {}", "training", "megatron_extra_kwargs", {}),
        ("--learning_rate 0.1", "learning_rate", "lr", 0.1),
        ("--eval_steps 9", "evaluation", "eval_interval", 9),
        ("--gradient_accumulation_fusion false", "kernels", "no_gradient_accumulation_fusion", True),
        ("--masked_softmax_fusion", "kernels", "no_masked_softmax_fusion", False),
        ("--bias_dropout_fusion 0", "kernels", "no_bias_dropout_fusion", True),
        ("--bias_swiglu_fusion no", "kernels", "no_bias_swiglu_fusion", True),
        ("--rope_fusion=false", "kernels", "no_rope_fusion", True),
    ],
)
def test_a_flag_overrides_its_field_alone(dense, line, group, name, value):
    _, recipe = parse(line.split(), dense)
    assert getattr(getattr(recipe, group), name) == value
    if "--lr 1" not in line or group == "learning_rate":
        assert replace(recipe, **{group: getattr(dense, group)}) == dense


def test_a_given_model_takes_the_place_of_a_new_one_with_its_shape(dense: Recipe) -> None:
    experts = MoE(num_experts=4, moe_router_topk=2, moe_layer_freq=2, moe_aux_loss_coeff=0.1)
    new = replace(dense, model=replace(dense.model, torch_dtype="float32", hidden_dropout=0.1), moe=experts)
    assert new.model.model is None
    _, found = parse(["--model", "Qwen/Qwen3-8B", "--num_layers", "36"], new)
    assert found.model == Model(model="Qwen/Qwen3-8B", num_layers=36, torch_dtype="float32", hidden_dropout=0.1)
    assert found.moe == MoE(moe_aux_loss_coeff=0.1)
    _, again = parse(["--model", "Qwen/Qwen3-4B"], found)
    assert again.model.num_layers == 36
    assert parse(["--model", "none"], new)[1] == new


def test_every_parameter_can_be_set_by_each_of_its_spellings(dense):
    for parameter in parameters(Recipe):
        text = parameter.default
        texts = [str(item) for item in text] if isinstance(text, tuple) else [str(text)]
        for spelling in (parameter.name, *parameter.facts.aliases):
            line = [f"--{parameter.group}.{spelling}", *(texts or ["[]"])]
            _, recipe = parse(line, dense)
            assert getattr(getattr(recipe, parameter.group), parameter.name) == parameter.default


def test_name_and_task_are_flags_too(dense):
    _, recipe = parse(["--name", "other", "--task=pt"], dense)
    assert (recipe.name, recipe.task) == ("other", "pt")


def test_own_flags_are_not_parameters(dense):
    actions, recipe = parse(["--dry-run", "--submit", "--cluster", "big", "--run_dir=/runs/x"], dense)
    assert recipe == dense
    assert (actions.dry_run, actions.submit, actions.local) == (True, True, False)
    assert (actions.cluster, actions.run_dir, actions.help) == ("big", "/runs/x", False)


def test_help_reads_nothing_else(dense):
    assert parse(["--nonsense", "--help"], dense)[0].help
    assert parse(["-h"], dense)[0].help


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--tensor_parallel_size 2", "--tensor_parallel_size is not a parameter; try --tensor_model_parallel_size"),
        ("--learnin_rate 2", "--learnin_rate is not a parameter; try --learning_rate"),
        ("--quant_bits 4", "--quant_bits asks for QLoRA, which is not supported: the frozen weights stay in bf16 or"),
        (
            "--use_megatron_fsdp true",
            "--use_megatron_fsdp belongs to Megatron-FSDP, which is not built; use_distributed",
        ),
        ("--ddp_timeout 600", "--ddp_timeout is not a parameter; try --distributed_timeout_minutes (minutes, not sec"),
        ("--agent_template hermes", "--agent_template has no counterpart: the model's own chat template writes tools"),
        ("--partition a100", "--partition belongs in the cluster profile that --cluster names, not in a run"),
        ("--parallel.lr 2", "--parallel.lr is not a parameter"),
        ("--submitt", "--submitt is not a parameter; try --submit"),
        ("--train_iters many", "training.train_iters='many' must be a whole number or None"),
        ("--sequence_parallel maybe", "parallel.sequence_parallel='maybe' must be true or false"),
        ("--train_iters", "training.train_iters needs a value"),
        ("--train_iters 1 2", "training.train_iters takes one value, but got 2"),
        ("--optimizer adamw", "optimizer.optimizer='adamw' must be one of 'adam', 'sgd'"),
        ("--save_steps 1 --save_interval 1", "--save_interval was already given as --save_steps; give one of them"),
        ("--lr 1 --lr 1", "--lr is given twice"),
        ("--rope_fusion --no_rope_fusion", "--no_rope_fusion was already given as --rope_fusion; give one of them"),
        ("--submit now", "--submit takes no value, but got 'now'"),
        ("--cluster", "--cluster needs one value"),
        ("--name", "--name needs one value"),
        ("train.jsonl", "train.jsonl is not a flag; flags begin with --"),
    ],
)
def test_one_clear_fault(dense, line, text):
    (fault,) = faults(line, dense)
    assert fault.startswith(text)


def test_all_faults_are_reported_at_once(dense):
    assert len(faults("stray --lr x --nope 1 --submit y --eval_iters 1 --eval_iters 2", dense)) == 5


def test_a_token_is_never_echoed(dense):
    for line in ("--hub_token secret1 secret2", "--hub_token=secret1 --hub_token=secret2", "--hub_token"):
        assert "secret" not in "".join(faults(line, dense))


def test_shared_names_follow_the_algorithm(dense):
    assert faults("--beta 1", dense) == [
        "--beta belongs to several algorithms; name one; try --dpo.beta or --kto.beta or --grpo.beta or --gkd.beta"
    ]
    for algorithm in ("dpo", "kto", "grpo", "gkd"):
        _, recipe = parse(f"--beta 0.7 --task rlhf --rlhf_type {algorithm}".split(), dense)
        assert getattr(recipe, algorithm).beta == 0.7
        assert replace(recipe, **{algorithm: getattr(dense, algorithm)}).gkd.beta == 0.5
    _, recipe = parse(["--kto.beta", "0.7"], dense)
    assert recipe.kto.beta == 0.7
    assert faults("--beta 1 --task rlhf --rlhf_type rm", dense)[0].startswith("--beta belongs to several")


def test_help_names_every_flag_with_default_and_state():
    text = help_text("recipe.py")
    for parameter in parameters(Recipe):
        assert f"--{parameter.name}  (" in text
    assert "--submit" in text and "not built yet" in text
    assert "--save_interval  (a whole number; at least 1; default 500; also --save_steps)" in text
    assert "--no_rope_fusion  (true or false; default False; speed only; also --rope_fusion (opposite)" in text


def test_flags_of_other_trainers_are_named_with_their_place_here(dense: Recipe) -> None:
    found = faults("--gradient_accumulation_steps 4 --truncation_mode keep_end", dense)
    assert found == [
        "--gradient_accumulation_steps is not a parameter; try --global_batch_size",
        "--truncation_mode is not a parameter; try --truncation_strategy left or --truncation_strategy right",
    ]


def test_dotted_names_of_other_programs_are_known_by_their_ends(dense: Recipe) -> None:
    line = "--trainer.devices 8 --actor_rollout_ref.rollout.n 8 --model.optim.lr 1e-5 --algorithm.kl_ctrl.kl_coef 0"
    assert faults(line, dense) == [
        "--trainer.devices is not a parameter; try --gpus_per_node",
        "--actor_rollout_ref.rollout.n is not a parameter; try --num_generations",
        "--model.optim.lr is not a parameter; try --lr",
        "--algorithm.kl_ctrl.kl_coef is not a parameter; try --beta",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--submit trainer.devices=8", "trainer.devices=8 is not a flag; flags begin with --; try --gpus_per_node"),
        ("lr=3", "lr=3 is not a flag; flags begin with --; try --lr 3"),
        ("--dry_run +a.b=1", "+a.b=1 is not a flag; flags begin with --"),
        ("--submit now", "--submit takes no value, but got 'now'"),
    ],
)
def test_assignments_without_dashes_are_no_values_of_switches(dense: Recipe, line: str, said: str) -> None:
    assert faults(line, dense) == [said]


def test_names_of_other_programs_are_no_names_of_ours_and_point_at_some():
    ours = {name for one in parameters(Recipe) for name in (one.name, *one.facts.aliases, *one.facts.negated_aliases)}
    others = {*OTHERWISE, *WITHOUT, *QLORA, *OF_THE_CLUSTER}
    assert not others & ours
    assert {instead.split()[0] for names in OTHERWISE.values() for instead in names} <= ours | {"task"}


@pytest.mark.parametrize(
    ("line", "dotted", "value"),
    [
        ("--logging_steps 7", "logging.log_interval", 7),
        ("--mcore_adapter a", "tuner.adapter_load", "a"),
        ("--perform_initialization true", "checkpoint.no_initialization", False),
        ("--data_sharding true", "data.no_data_sharding", False),
        ("--bias_activation_fusion false", "kernels.no_bias_swiglu_fusion", True),
        ("--virtual_pipeline_model_parallel_size 2", "parallel.num_virtual_stages_per_pipeline_rank", 2),
        ("--ddp_backend gloo", "parallel.distributed_backend", "gloo"),
        ("--swanlab_project p", "logging.wandb_project", "p"),
    ],
)
def test_names_of_megatron_swift_4_6_mean_the_same_parameters(dense, line, dotted, value):
    _, recipe = parse(line.split(), dense)
    group, _, name = dotted.partition(".")
    assert getattr(getattr(recipe, group), name) == value
