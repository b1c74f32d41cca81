"""Rules for the length and schedule of a run: data, length, learning rate, recomputation, precision, task and
resources."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from megabatch.config.checkpoint import Checkpoint
from megabatch.config.evaluation_metrics import evaluation_metrics
from megabatch.config.layout import chunks_of
from megabatch.config.recipe import Recipe
from megabatch.config.rlhf import Rlhf
from megabatch.config.torch_dtype import torch_dtype
from megabatch.config.walltime import seconds
from megabatch.errors import ConfigError, Fault
from megabatch.loss_scales import parse
from megabatch.plan.batch import nearest_divisors
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.tasks import TASKS, find_task

_GRANULARITY = "recompute.recompute_granularity"


def data_is_given(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    data = recipe.data
    if not data.dataset:
        yield Fault("data.dataset", None, "is missing: name at least one file, folder or hub dataset", bare=True)
    if data.val_dataset and data.split_dataset_ratio:
        rule = "has no effect with val_dataset; give one of them"
        yield Fault("data.split_dataset_ratio", data.split_dataset_ratio, rule, try_=(0,))
    if data.packing_length is not None and not data.packing:
        yield Fault("data.packing_length", data.packing_length, "needs packing, which is False")


def only_documents_are_cut_into_pieces(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    if recipe.data.truncation_strategy == "split" and not _reads_documents(recipe):
        rule = f"is for task='pt', not {recipe.task!r}: an answer's later pieces would lack the question"
        yield Fault("data.truncation_strategy", "split", rule, try_=("right", "delete"))


def _reads_documents(recipe: Recipe) -> bool:
    return recipe.kind is not None and recipe.kind.rows == "documents"


def padding_and_packing_agree(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.data.packing and not recipe.data.padding_free:
        yield Fault("data.padding_free", False, "pads samples to one length, and packing=True lays them end to end")


def one_pass_has_one_epoch(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    epochs = recipe.training.max_epochs
    if recipe.data.dataloader_type == "single" and (epochs or 1) > 1:
        rule = f"is one pass over the data, and max_epochs={epochs}"
        yield Fault("data.dataloader_type", "single", rule, try_=("cyclic",))


def streaming_needs_no_whole_dataset(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    data, training = recipe.data, recipe.training
    if not data.streaming:
        if data.dataloader_type == "external":
            yield Fault("data.dataloader_type", "external", "is what streaming=True uses", try_=("cyclic", "single"))
        return
    if training.train_iters is None:
        yield Fault("data.streaming", True, "needs train_iters: the length of a stream is not known")
    if recipe.kind is not None and not recipe.kind.streams:
        streaming = " and ".join(task.name for task in TASKS if task.streams)
        yield Fault("data.streaming", True, f"is for {streaming}, not {recipe.kind.name}", try_=(False,))
    if training.max_epochs is not None:
        rule = f"and max_epochs={training.max_epochs}: the length of a stream is not known; set train_iters alone"
        yield Fault("data.streaming", True, rule)
    if data.split_dataset_ratio:
        rule = "needs all samples before training, and streaming=True reads them later; give val_dataset"
        yield Fault("data.split_dataset_ratio", data.split_dataset_ratio, rule, try_=(0,))
    if data.dataloader_type == "single":
        rule = "ends with the data, and streaming=True goes on from its beginning"
        yield Fault("data.dataloader_type", "single", rule, try_=("external",))
    for name in ("group_by_length", "pad_to_max_length"):
        if getattr(data, name):
            yield Fault(f"data.{name}", True, "needs the lengths of all samples, which streaming=True does not know")
    if training.enable_channel_loss:
        rule = "names its metrics by the channels of all samples, which streaming=True does not know"
        yield Fault("training.enable_channel_loss", True, rule)


def scales_weigh_conversations(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    text = recipe.data.loss_scale
    if text is not None and _reads_documents(recipe) and parse(text).scales:
        rule = "weighs parts of an assistant's turns, and task='pt' reads plain texts, of which every token is learned"
        yield Fault("data.loss_scale", text, rule, try_=(None,))


def one_of_steps_and_epochs(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    steps, epochs = recipe.training.train_iters, recipe.training.max_epochs
    if steps is None and epochs is None:
        yield Fault("training.train_iters", None, "is missing; give it or max_epochs", bare=True)
    if steps is not None and epochs is not None and not recipe.data.streaming:
        yield Fault(
            "training.train_iters", steps, f"and max_epochs={epochs} both decide the length; set one of them to None"
        )


def safetensors_are_saved_with_checkpoints(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    group, name = recipe.checkpoint, "checkpoint.save_safetensors_interval"
    interval = group.save_safetensors_interval
    if interval is None:
        return
    if not group.save_safetensors:
        yield Fault(name, interval, "has no effect with save_safetensors=False; set one of them", try_=(None,))
    elif group.no_save_optim:
        yield Fault(name, interval, "with no_save_optim=True leaves the checkpoints in between empty", try_=(None,))
    if group.save_strategy == "steps" and interval % group.save_interval:
        below = interval // group.save_interval * group.save_interval
        near = tuple(n for n in (below, below + group.save_interval) if n)
        yield Fault(name, interval, f"must be a multiple of save_interval={group.save_interval}", try_=near)


def epochs_have_no_intervals(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """`save_strategy` epoch saves and evaluates after each epoch; an interval of steps would be silently lost."""
    if recipe.checkpoint.save_strategy != "epoch":
        return
    given = (
        ("checkpoint.save_interval", recipe.checkpoint.save_interval, Checkpoint().save_interval),
        ("evaluation.eval_interval", recipe.evaluation.eval_interval, None),
    )
    for field, value, default in given:
        if value not in (default, 1):
            yield Fault(field, value, "has no effect with save_strategy='epoch', which saves after each", try_=(1,))


def the_best_is_evaluated_and_saved(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    group, field = recipe.checkpoint, "checkpoint.metric_for_best_model"
    metric, evaluates_every = group.metric_for_best_model, recipe.evaluation.eval_interval
    if metric is None:
        if group.greater_is_better is not None:
            rule = "needs metric_for_best_model, which is None"
            yield Fault("checkpoint.greater_is_better", group.greater_is_better, rule, try_=(None,))
        return
    if not (recipe.data.val_dataset or recipe.data.split_dataset_ratio):
        yield Fault(field, metric, "needs validation data: val_dataset or split_dataset_ratio", try_=(None,))
    if group.save_strategy == "steps" and evaluates_every and group.save_interval % evaluates_every:
        rule = f"must be a multiple of eval_interval={evaluates_every} for metric_for_best_model={metric!r}"
        yield Fault("checkpoint.save_interval", group.save_interval, rule, try_=(evaluates_every,))


def the_best_is_of_a_metric(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    metric, found = recipe.checkpoint.metric_for_best_model, evaluation_metrics(recipe)
    if metric is None or found is None or (name := metric.removeprefix("eval_")) in found:
        return
    names = ", ".join((*found.names, *(f"{start}…" for start in found.prefixes)))
    rule = f"is no metric of this run's evaluation, which has {names}"
    near = get_close_matches(name, found.names, n=2)
    yield Fault("checkpoint.metric_for_best_model", metric, rule, try_=near)


def warmup_is_said_once(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    rate = recipe.learning_rate
    if rate.lr_warmup_iters and rate.lr_warmup_fraction is not None:
        rule = f"and lr_warmup_fraction={rate.lr_warmup_fraction} both set the warmup; set one of them to 0 or None"
        yield Fault("learning_rate.lr_warmup_iters", rate.lr_warmup_iters, rule, try_=(0,))
    last = rate.lr_decay_iters or recipe.training.train_iters
    if last is not None and rate.lr_warmup_iters >= last:
        rule = f"must be below the {last} steps of decay"
        yield Fault("learning_rate.lr_warmup_iters", rate.lr_warmup_iters, rule, try_=(last - 1,))


def stable_phase_ends(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """WSD decays at the end, by a length and in a shape of its own; other styles have neither."""
    rate, field = recipe.learning_rate, "learning_rate.lr_wsd_decay_iters"
    length = rate.lr_wsd_decay_iters
    last = rate.lr_decay_iters or recipe.training.train_iters
    if rate.lr_decay_style != "WSD":
        for name, default in (("lr_wsd_decay_iters", None), ("lr_wsd_decay_style", "exponential")):
            if (value := getattr(rate, name)) != default:
                rule = f"needs lr_decay_style='WSD', which is {rate.lr_decay_style!r}"
                yield Fault(f"learning_rate.{name}", value, rule)
    elif length is None:
        yield Fault(field, None, "is missing: lr_decay_style='WSD' needs it", bare=True)
    elif last is not None and length > last - rate.lr_warmup_iters:
        rule = f"must be at most {last - rate.lr_warmup_iters}, the steps of decay after warmup"
        yield Fault(field, length, rule, try_=(max(1, (last - rate.lr_warmup_iters) // 10),))


def norms_to_decay_exist(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.optimizer.apply_wd_to_qk_layernorm and shape is not None and not shape.qk_layernorm:
        rule = f"has no effect: {shape.model_type} has no norms of queries and keys"
        yield Fault("optimizer.apply_wd_to_qk_layernorm", True, rule, try_=(False,))


def weight_decay_is_said_once(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """One that changes has two ends, and `weight_decay` is the one that does not."""
    group = recipe.optimizer
    ends = {name: getattr(group, name) for name in ("start_weight_decay", "end_weight_decay")}
    if group.weight_decay_incr_style == "constant":
        for name, value in ends.items():
            if value is not None:
                rule = "needs weight_decay_incr_style linear or cosine; a constant one is weight_decay"
                yield Fault(f"optimizer.{name}", value, rule)
        return
    for name, value in ends.items():
        if value is None:
            rule = f"is missing: weight_decay_incr_style={group.weight_decay_incr_style!r} needs it"
            yield Fault(f"optimizer.{name}", None, rule, bare=True)
    start, end = ends.values()
    if start is not None and end is not None and end < start:
        rule = f"must be at least start_weight_decay={start}"
        yield Fault("optimizer.end_weight_decay", end, rule, try_=(start,))


def template_variables_are_said_once(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    data = recipe.data
    if data.enable_thinking is not None and "enable_thinking" in (data.chat_template_kwargs or {}):
        rule = "and chat_template_kwargs both set it; leave one out"
        yield Fault("data.enable_thinking", data.enable_thinking, rule, try_=(None,))
    if _reads_documents(recipe):
        for name in ("enable_thinking", "chat_template_kwargs"):
            if (value := getattr(data, name)) is not None:
                yield Fault(f"data.{name}", value, "has no effect: pt renders no chat template", try_=(None,))


def learning_rate_is_above_its_floor(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    rate = recipe.learning_rate
    lr = peak_lr(recipe)
    if rate.min_lr > lr:
        yield Fault("learning_rate.min_lr", rate.min_lr, f"must be at most lr={lr}", try_=(float(f"{lr / 10:g}"), 0))
    if rate.lr_warmup_init > lr:
        yield Fault("learning_rate.lr_warmup_init", rate.lr_warmup_init, f"must be at most lr={lr}", try_=(0,))
    if rate.lr_warmup_init and not (rate.lr_warmup_iters or rate.lr_warmup_fraction):
        rule = "has no effect without lr_warmup_iters or lr_warmup_fraction"
        yield Fault("learning_rate.lr_warmup_init", rate.lr_warmup_init, rule, try_=(0,))


def peak_lr(recipe: Recipe) -> float:
    """lr, or its default for the kind of training."""
    return recipe.learning_rate.lr or (1e-4 if recipe.tuner.tuner_type == "lora" else 1e-5)


def recompute_is_consistent(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    recompute = recipe.recompute
    granularity, method, layers = (
        recompute.recompute_granularity,
        recompute.recompute_method,
        recompute.recompute_num_layers,
    )
    if granularity == "full":
        if method is None:
            yield Fault(_GRANULARITY, granularity, "needs recompute_method uniform or block")
        if layers is None:
            yield Fault(_GRANULARITY, granularity, "needs recompute_num_layers", try_=("recompute_num_layers=1",))
    else:
        for name, value in (("recompute_method", method), ("recompute_num_layers", layers)):
            if value is not None:
                rule = f"needs recompute_granularity='full', which is {granularity!r}"
                yield Fault(f"recompute.{name}", value, rule)
    modules = recompute.recompute_modules
    if granularity != "selective" and modules != ("core_attn",):
        rule = f"needs recompute_granularity='selective', which is {granularity!r}"
        yield Fault("recompute.recompute_modules", modules, rule)


def recompute_modules_exist(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.recompute.recompute_granularity != "selective":
        return
    modules, field = recipe.recompute.recompute_modules, "recompute.recompute_modules"
    for module in modules:
        if module.startswith("moe") and shape is not None and shape.num_experts is None:
            yield Fault(field, modules, f"has {module!r}, but {shape.model_type} has no experts")
    if "moe_act" in modules and not recipe.moe.moe_grouped_gemm:
        yield Fault(field, modules, "has 'moe_act', which needs moe_grouped_gemm")
    if "mla_up_proj" in modules and not recipe.mla.multi_latent_attention:
        yield Fault(field, modules, "has 'mla_up_proj', which needs multi_latent_attention")


def recompute_units_divide(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    recompute = recipe.recompute
    unit, field = recompute.recompute_num_layers, "recompute.recompute_num_layers"
    if shape is None or unit is None or recompute.recompute_granularity != "full":
        return
    counts = sorted({len(chunk.layers) for chunk in chunks_of(recipe.parallel, shape.num_layers) or ()})
    for count in counts:
        if recompute.recompute_method == "uniform" and count % unit:
            rule = f"must divide the {count} layers of a pipeline chunk"
            yield Fault(field, unit, rule, try_=nearest_divisors(unit, of=count))
    if recompute.recompute_method == "block" and counts and unit > counts[-1]:
        yield Fault(field, unit, f"must be at most the {counts[-1]} layers of a pipeline chunk")


def precision_is_said_once(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    fp16, bf16, dtype = recipe.precision.fp16, recipe.precision.bf16, recipe.model.torch_dtype
    if fp16 and bf16:
        yield Fault("precision.fp16", True, "and bf16=True exclude each other; give one of them")
    for name, flag, matching in (("fp16", fp16, "float16"), ("bf16", bf16, "bfloat16")):
        if flag is not None and dtype is not None and flag != (dtype == matching):
            yield Fault(f"precision.{name}", flag, f"contradicts torch_dtype={dtype!r}", try_=(not flag,))
    if recipe.training.deterministic_mode and recipe.kernels.cross_entropy_loss_fusion:
        rule = "is not deterministic; turn it off or unset deterministic_mode"
        yield Fault("kernels.cross_entropy_loss_fusion", True, rule, try_=(False,))


def reduced_state_has_its_optimizer(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    """The precision-aware optimizer is Transformer Engine's Adam, with fp32 copies of bfloat16 weights."""
    group, name = recipe.optimizer, "optimizer.use_precision_aware_optimizer"
    if not group.use_precision_aware_optimizer:
        for field in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            if (value := getattr(group, field)) != "fp32":
                yield Fault(f"optimizer.{field}", value, "needs use_precision_aware_optimizer=True", try_=("fp32",))
        return
    if group.optimizer != "adam":
        yield Fault(name, True, f"needs optimizer='adam', which is {group.optimizer!r}", try_=(False,))
    if not recipe.parallel.use_distributed_optimizer:
        yield Fault(name, True, "needs parallel.use_distributed_optimizer=True", try_=(False,))
    if not recipe.resources.gpus_per_node and not group.optimizer_cpu_offload:
        rule = "needs Transformer Engine's Adam, which runs on GPUs, and resources.gpus_per_node is 0"
        yield Fault(name, True, rule, try_=(False,))
    if shape is not None and (dtype := torch_dtype(recipe, shape)) != "bfloat16":
        rule = f"needs the model's torch_dtype to be 'bfloat16', which is {dtype!r}"
        yield Fault(name, True, rule, try_=(False,))


def offloaded_state_is_adams(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    group, name = recipe.optimizer, "optimizer.optimizer_cpu_offload"
    if not group.optimizer_cpu_offload:
        if (fraction := group.optimizer_offload_fraction) != 1.0:
            rule = "needs optimizer_cpu_offload=True"
            yield Fault("optimizer.optimizer_offload_fraction", fraction, rule, try_=(1.0,))
        return
    if group.optimizer != "adam":
        yield Fault(name, True, f"needs optimizer='adam', which is {group.optimizer!r}", try_=(False,))
    if not recipe.parallel.use_distributed_optimizer:
        yield Fault(name, True, "needs parallel.use_distributed_optimizer=True", try_=(False,))
    for field in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if (value := getattr(group, field)) != "fp32":
            rule = "cannot be combined with optimizer_cpu_offload=True: the host's Adam keeps its state in fp32"
            yield Fault(f"optimizer.{field}", value, rule, try_=("fp32",))


def loss_scale_has_a_range(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    first, least = recipe.precision.initial_loss_scale, recipe.precision.min_loss_scale
    if least > first:
        rule = f"must be at most initial_loss_scale={first:g}"
        yield Fault("precision.min_loss_scale", least, rule, try_=(first,))


def task_and_algorithm_agree(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    task, algorithm, task_type = recipe.kind, recipe.rlhf.rlhf_type, recipe.training.task_type
    if recipe.task != "rlhf" and algorithm != Rlhf().rlhf_type:
        yield Fault("rlhf.rlhf_type", algorithm, f"needs task='rlhf', which is {recipe.task!r}")
    if task is None and find_task(recipe.task, rlhf_type=algorithm):
        fitting = dict.fromkeys(repr(one.task) for one in TASKS if one.task_type == task_type)
        yield Fault("training.task_type", task_type, f"needs task={' or '.join(fitting)}, which is {recipe.task!r}")
    weights, rewards = recipe.grpo.reward_weights, [*recipe.grpo.reward_funcs, *recipe.grpo.reward_model]
    rewards += ["environment"] if recipe.rollout.use_gym_env else []
    if weights is not None and len(weights) != len(rewards):
        rule = f"must have one weight for each of the {len(rewards)} reward_funcs, reward models and environment"
        yield Fault("grpo.reward_weights", weights, rule)
    labels = recipe.training.num_labels
    if task_type == "seq_cls" and labels is None:
        yield Fault("training.num_labels", None, "is missing: task_type seq_cls needs it", bare=True)
    if task_type != "seq_cls" and labels is not None:
        yield Fault("training.num_labels", labels, f"needs task_type='seq_cls', which is {task_type!r}")
    yield from _kind_of_labels(recipe)


def _kind_of_labels(recipe: Recipe) -> Iterator[Fault]:
    training = recipe.training
    kind, labels = training.problem_type, training.num_labels
    if kind is not None and training.task_type != "seq_cls":
        yield Fault("training.problem_type", kind, f"needs task_type='seq_cls', which is {training.task_type!r}")
    if kind == "single_label_classification" and labels == 1:
        yield Fault("training.num_labels", 1, f"must be at least 2 for problem_type={kind!r}", try_=(2,))


def scores_are_of_samples(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Their loss is a mean over samples; what concerns tokens has no meaning for them."""
    training, kind = recipe.training, recipe.kind
    if kind is None or (kind.rows != "yes_no" and kind.head is None):
        return
    one = "scored token" if kind.scores_tokens else "sample"
    why = f"concerns the loss of tokens, and {kind.name} has one loss for each {one}"
    if training.calculate_per_token_loss:
        yield Fault("training.calculate_per_token_loss", True, why, try_=(False,))
    if recipe.data.loss_scale not in (None, kind.loss_scale):
        yield Fault("data.loss_scale", recipe.data.loss_scale, why, try_=(None,))
    for name in ("enable_dft_loss", "enable_channel_loss"):
        if getattr(training, name):
            yield Fault(f"training.{name}", True, why, try_=(False,))


def answers_differ_and_are_asked_for(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    kind, group = recipe.kind, recipe.reranker
    if kind is None or kind.rows != "yes_no":
        return
    if group.generative_reranker_positive_token == group.generative_reranker_negative_token:
        rule = "is also generative_reranker_negative_token; the answers must differ"
        yield Fault("reranker.generative_reranker_positive_token", group.generative_reranker_positive_token, rule)
    if recipe.data.truncation_strategy == "right":
        rule = "cuts off the end of a document's conversation, where the answer begins"
        yield Fault("data.truncation_strategy", "right", rule, try_=("delete", "left"))


def steps_are_kept(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.kind is None or recipe.kind.rows != "steps":
        return
    if not recipe.prm.step_separator:
        yield Fault("prm.step_separator", "", "must be a text that is not empty: a step is scored at its end")
    if recipe.data.truncation_strategy == "right":
        rule = "cuts off an answer's last steps and their labels"
        yield Fault("data.truncation_strategy", "right", rule, try_=("delete", "left"))


def embeddings_are_consistent(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    group, kind = recipe.embedding, recipe.kind
    if kind is None or kind.name != "embedding":
        return
    dims, weights = group.mrl_dims, group.mrl_weights
    if weights and len(weights) != len(dims):
        yield Fault("embedding.mrl_weights", weights, f"must have one weight for each of the {len(dims)} mrl_dims")
    if shape is not None and any(not 0 < one < shape.hidden_size for one in dims):
        yield Fault("embedding.mrl_dims", dims, f"must be between 0 and the model's hidden_size={shape.hidden_size}")
    if len({*dims}) < len(dims):
        yield Fault("embedding.mrl_dims", dims, "names a number of dimensions twice")
    if recipe.tuner.tuner_type == "lora" and recipe.bridge.merge_lora is False:
        rule = "saves an adapter of a causal model, which is none of an embedding model's; let it be merged"
        yield Fault("bridge.merge_lora", False, rule, try_=(True,))


def backend_fits_the_device(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    gpus, backend = recipe.resources.gpus_per_node, recipe.parallel.distributed_backend
    if gpus == 0 and backend == "nccl":
        rule = "needs GPUs, but resources.gpus_per_node is 0"
        yield Fault("parallel.distributed_backend", "nccl", rule, try_=("gloo",))
    if gpus and backend == "gloo":
        rule = f"is for runs on CPUs, but resources.gpus_per_node is {gpus}"
        yield Fault("parallel.distributed_backend", "gloo", rule, try_=("nccl",))


def seq_length_says_nothing_else(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    wanted, longest = recipe.data.seq_length, recipe.data.max_length
    if wanted is not None and wanted != longest:
        rule = f"must equal max_length={longest}, which sets how long samples may be"
        yield Fault("data.seq_length", wanted, rule, try_=(f"max_length={wanted}",))


def each_rank_has_its_gpu(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    tasks, gpus = recipe.resources.tasks_per_node, recipe.resources.gpus_per_node
    if tasks is not None and gpus and tasks > gpus:
        yield Fault("resources.tasks_per_node", tasks, f"must be at most gpus_per_node={gpus}", try_=(gpus,))


def time_covers_the_signal(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    resources = recipe.resources
    try:
        limit = seconds(resources.time)
    except ConfigError as error:
        yield Fault("resources.time", resources.time, str(error), try_=("12:00:00",))
        return
    if resources.signal_delay_s >= limit:
        rule = f"must be below time={resources.time!r}, which is {limit} s"
        yield Fault("resources.signal_delay_s", resources.signal_delay_s, rule, try_=(max(1, limit // 4),))


RULES = (
    data_is_given,
    only_documents_are_cut_into_pieces,
    scales_weigh_conversations,
    streaming_needs_no_whole_dataset,
    padding_and_packing_agree,
    one_pass_has_one_epoch,
    one_of_steps_and_epochs,
    safetensors_are_saved_with_checkpoints,
    epochs_have_no_intervals,
    the_best_is_evaluated_and_saved,
    the_best_is_of_a_metric,
    warmup_is_said_once,
    stable_phase_ends,
    norms_to_decay_exist,
    learning_rate_is_above_its_floor,
    weight_decay_is_said_once,
    template_variables_are_said_once,
    recompute_is_consistent,
    recompute_modules_exist,
    recompute_units_divide,
    precision_is_said_once,
    reduced_state_has_its_optimizer,
    offloaded_state_is_adams,
    loss_scale_has_a_range,
    task_and_algorithm_agree,
    scores_are_of_samples,
    answers_differ_and_are_asked_for,
    steps_are_kept,
    embeddings_are_consistent,
    backend_fits_the_device,
    seq_length_says_nothing_else,
    each_rank_has_its_gpu,
    time_covers_the_signal,
)
