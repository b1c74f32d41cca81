"""The plan of a run, for people: what is trained, how it is split, how much each step takes, where it runs."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.lengths import generates, item_tokens, positions
from megabatch.config.recipe import Recipe
from megabatch.config.roles import Role
from megabatch.config.shared_prompts import infers_alone
from megabatch.data.counts import DataCounts
from megabatch.data.rows.names import parse
from megabatch.entry.data_counts import counts_of
from megabatch.entry.launch import Launch
from megabatch.errors import Fault
from megabatch.hub_cache import download_command
from megabatch.plan.batch import train_iters
from megabatch.plan.model_size import num_active_parameters, num_parameters
from megabatch.plan.shape import ModelShape
from megabatch.slurm.environment import Variable, job_variables

_WIDTH = 12
_LINKS = "{} in a row, each continuing where the previous one stopped; none requeues; left-over jobs never start"


def plan_text(launch: Launch, *, refusals: list[Fault], local: bool = False) -> str:
    """One line per concern, then notes; `refusals` are the faults for which a real start would be refused here."""
    lines = [
        ("run", f"{launch.recipe.name} ({launch.recipe.task}) in {launch.directory.path}"),
        ("model", _model(launch)),
        ("layout", _layout(launch)),
        ("batch", _batch(launch)),
        ("length", _length(launch)),
        ("data", _data(launch)),
        ("where", _where(launch, local=local)),
        *([("jobs", _LINKS.format(launch.job.links))] if launch.job.links > 1 else []),
        ("environment", " ".join(map(_set, job_variables(launch.job, launch.profile)))),
    ]
    text = [f"{name:{_WIDTH}} {value}" for name, value in lines]
    text += [f"{'estimate':{_WIDTH}} {estimate}" for estimate in _estimate(launch)]
    text += [f"{'note':{_WIDTH}} {note}" for note in _notes(launch)]
    text += [f"{'refused here':{_WIDTH}} {fault}" for fault in refusals]
    return "\n".join(text)


def _set(variable: Variable) -> str:
    return f"{variable.name}={'<node cache>/' if variable.node_local else ''}{variable.value}"


def _model(launch: Launch) -> str:
    name, shape = launch.recipe.model.model or "new model", launch.model.shape
    if shape is None:
        return f"{name}: {launch.model.origin}"
    origin = "" if launch.recipe.model.model is None else f" ({launch.model.origin})"
    return f"{name}: {shape_text(shape)}{origin}"


def shape_text(shape: ModelShape) -> str:
    """`qwen3_moe, 48 layers, hidden 2048, 128 experts top 8, 30.5 B parameters, 3.4 B active`."""
    parts = [shape.model_type, f"{shape.num_layers} layers", f"hidden {shape.hidden_size}"]
    if shape.num_experts is not None:
        parts.append(f"{shape.num_experts} experts top {shape.moe_router_topk}")
    parts.append(f"{_count(num_parameters(shape))} parameters")
    if shape.num_experts is not None:
        parts.append(f"{_count(num_active_parameters(shape))} active")
    return ", ".join(parts)


def _count(number: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _layout(launch: Launch) -> str:
    layout = launch.layout
    if layout is None:
        return f"{launch.job.world_size} ranks that this layout does not divide"
    sizes = f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} x dp {layout.dp}"
    chunks = f", {layout.vp} chunks a stage" if layout.vp > 1 else ""
    shape = launch.model.shape
    experts = shape is None or shape.num_experts is not None
    expert_sizes = f"; experts ep {layout.ep} x etp {layout.etp} x dp {layout.edp}" if experts else ""
    return f"world {layout.world_size} = {sizes}{chunks}{expert_sizes}"


def _batch(launch: Launch) -> str:
    recipe, layout = launch.recipe, launch.layout
    total, micro = recipe.batch.global_batch_size, recipe.batch.micro_batch_size
    split = f" = micro-batch {micro} x dp {layout.dp} x {layout.num_microbatches} micro-batches" if layout else ""
    length = item_tokens(recipe, launch.model.shape)
    tokens = f"; up to {total * length:,} tokens" if length else ""
    return f"{total} {_items(recipe)} a step{split}{tokens}{_rollout(launch)}"


def _items(recipe: Recipe) -> str:
    if recipe.kind is not None and recipe.kind.generates:
        return "completions"
    if recipe.data.packing:
        return "packed rows"
    return "pairs" if recipe.kind is not None and recipe.kind.rows == "pairs" else "samples"


def _rollout(launch: Launch) -> str:
    """`; 16 prompts x 8 completions are generated for every step; log-probabilities of 16 completions at a time`."""
    recipe = launch.recipe
    if recipe.kind is None or not recipe.kind.generates:
        return ""
    group, steps = recipe.grpo.num_generations, recipe.grpo.steps_per_generation
    prompts = (recipe.grpo.generation_batch_size or recipe.batch.global_batch_size * steps) // group
    often = "each step" if steps == 1 else f"every {steps} steps"
    return f"; {prompts} prompts x {group} completions are generated for {often}{_inferred(launch)}"


def _inferred(launch: Launch) -> str:
    recipe, shape = launch.recipe, launch.model.shape
    if shape is None or launch.layout is None or not infers_alone(recipe):
        return ""
    from megabatch.entry.infer_batch import default_infer_batch_size

    size = recipe.grpo.infer_batch_size or default_infer_batch_size(recipe, shape)
    return f"; log-probabilities of {size} completion{'s' * (size != 1)} at a time"


def _length(launch: Launch) -> str:
    recipe, found = launch.recipe, counts_of(launch)
    steps, epochs, batch = recipe.training.train_iters, recipe.training.max_epochs or 1, recipe.batch.global_batch_size
    items = _items(recipe)
    if steps is not None:
        drawn = f"{steps:,} steps, which draw {steps * batch:,} {items}"
        return f"{drawn}: {steps * batch / found.items:.2f} epochs of {_amount(found)}" if found else drawn
    passes = f"{epochs} epochs" if epochs != 1 else "1 epoch"
    if found:
        iters = train_iters(found.items, epochs=epochs, global_batch_size=batch)
        return f"{iters:,} steps: {passes} of {_amount(found)}"
    return f"{passes} of all {items}; steps = {items} x {epochs} // {batch}, counted when the data is prepared"


def _amount(found: DataCounts) -> str:
    packed = f"{found.items:,} packed rows of " if found.items != found.samples else ""
    return f"{packed}{found.samples:,} samples, {found.tokens:,} tokens, counted in {found.cache}"


def _data(launch: Launch) -> str:
    data = launch.recipe.data
    text = ", ".join(data.dataset)
    if data.val_dataset:
        return f"{text}; validation {', '.join(data.val_dataset)}"
    ratio = data.split_dataset_ratio
    return f"{text}; {ratio:.1%} set aside for validation" if ratio else f"{text}; no validation"


def _where(launch: Launch, *, local: bool) -> str:
    if local:
        return f"this machine, {_counted(launch.job.world_size, 'process', 'processes')}"
    job, profile = launch.job, launch.profile
    devices = f"{_counted(job.gpus_per_node, 'GPU', 'GPUs')} each" if job.gpus_per_node else "without GPUs"
    cluster = f"cluster {launch.cluster}" if launch.cluster else "the default cluster"
    partition = f", partition {profile.partition}" if profile.partition else ""
    ranks = f"{_counted(job.nodes, 'node', 'nodes')} x {_counted(job.tasks_per_node, 'rank', 'ranks')}"
    servers = "".join(f"; beside them {_servers(role)}" for role in launch.recipe.roles)
    return f"{ranks}, {devices}, {job.time} on {cluster}{partition}{servers}"


def _servers(role: Role) -> str:
    """`1 node x 4 rollout servers, 8 GPUs each`."""
    nodes = _counted(role.nodes, "node", "nodes")
    servers = _counted(role.tasks_per_node, f"{role.name} server", f"{role.name} servers")
    gpus = f"{_counted(role.gpus_per_node, 'GPU', 'GPUs')} each" if role.gpus_per_node else "without GPUs"
    return f"{nodes} x {servers}, {gpus}"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _estimate(launch: Launch) -> Iterator[str]:
    """Memory and time, if the cluster profile names its nodes' GPU; `megabatch plan` prints more."""
    gpus, shape = launch.job.gpus_per_node, launch.model.shape
    if not gpus or launch.profile.gpu is None or shape is None or launch.layout is None:
        return
    from megabatch.entry import engine_memory, host_memory
    from megabatch.entry.estimate import estimate_of, gpu_of
    from megabatch.plan.memory import usable_gib

    gpu = gpu_of(launch.profile.gpu)
    found = estimate_of(launch.recipe, shape, gpu)
    taken, has = found.memory.total_gib, f"{gpu.memory_gib:g}"
    room = f"of {has}" if taken <= usable_gib(gpu) else f"of {has}, with less than the usual margin"
    room = room if taken <= gpu.memory_gib else f"and has only {has}"
    kind = launch.recipe.kind
    step = f"{found.step.total_s:.2f} s a step" + (", and generation" if kind is not None and kind.generates else "")
    yield f"{gpu.name}: a rank takes {found.memory.total_gib:.1f} GiB {room}; {step}"
    yield from engine_memory.lines(launch.recipe, shape, found, gpu)
    yield from host_memory.lines(launch.recipe, shape)


def _notes(launch: Launch) -> Iterator[str]:
    recipe, model = launch.recipe, launch.model
    if model.shape is None:
        yield "the model's shape is not known here, so the rules that need it were not checked"
    elif recipe.model.model is not None and model.folder is None:
        command = download_command(recipe.model.model, use_hf=recipe.bridge.use_hf)
        yield f"the run downloads the weights when it starts; if nodes have no network, run first: {command}"
    hubs = {"hf": "Hugging Face", "ms": "ModelScope"}
    named = [parse(text, use_hf=recipe.bridge.use_hf) for text in (*recipe.data.dataset, *recipe.data.val_dataset)]
    for name in named:
        if name.kind in hubs:
            yield f"{name.where} is downloaded from {hubs[name.kind]} when the run starts"
    if model.shape is not None and generates(recipe):
        yield from _short_completions(recipe, model.shape)


def _short_completions(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """A completion ends where the model's positions do."""
    longest, most = recipe.rollout.max_completion_length, positions(recipe, shape)
    if (recipe.data.max_length or 1) + longest > most:
        which = f"prompts of more than {most - longest} tokens leave" if most > longest else "every prompt leaves"
        yield f"{which} less than rollout.max_completion_length={longest}: the model takes {most} tokens"
