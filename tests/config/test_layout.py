"""A recipe that passes every rule has a layout, and its pipeline holds every layer once."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch import Batch, Data, Model, Parallel, Recipe, Resources, Training
from megabatch.config.layout import chunks_of, layout_of
from megabatch.config.new_model import declared_shape
from megabatch.config.rules.check import check

seldom = st.one_of(*[st.none()] * 4, st.integers(1, 6))
layouts = st.one_of(
    *[st.none()] * 3, st.sampled_from(["Ett|ttL", "E|tttt|L|", "Et|t|t|tL", "E(t|)*4L", "Et*3|t*3,|t*2L", "Ett|"])
)
parallels = st.builds(
    Parallel,
    tensor_model_parallel_size=st.sampled_from([1, 1, 2, 4]),
    pipeline_model_parallel_size=st.integers(1, 4),
    decoder_first_pipeline_num_layers=seldom,
    decoder_last_pipeline_num_layers=seldom,
    account_for_embedding_in_pipeline_split=st.sampled_from([False, False, False, True]),
    account_for_loss_in_pipeline_split=st.sampled_from([False, False, False, True]),
    num_layers_per_virtual_pipeline_stage=seldom,
    num_virtual_stages_per_pipeline_rank=seldom,
    pipeline_model_parallel_layout=layouts,
)


@settings(max_examples=400)
@given(parallel=parallels, layers=st.integers(1, 12), dp=st.integers(1, 4), batch=st.integers(1, 8))
def test_passing_recipes_have_whole_layouts(parallel, layers, dp, batch):
    tasks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * dp
    recipe = Recipe(
        name="any",
        task="sft",
        model=Model(
            model_type="llama",
            num_layers=layers,
            hidden_size=64,
            num_attention_heads=4,
            padded_vocab_size=64,
            torch_dtype="float32",
        ),
        data=Data(dataset=["x"], max_length=16),
        training=Training(train_iters=1),
        batch=Batch(global_batch_size=batch * dp),
        parallel=replace(parallel, distributed_backend="gloo"),
        resources=Resources(gpus_per_node=0, tasks_per_node=tasks),
    )
    faults = check(recipe)
    shape = declared_shape(recipe)
    assert shape is not None
    if faults:
        return
    layout, chunks = layout_of(recipe, shape), chunks_of(recipe.parallel, layers)
    assert layout is not None and chunks is not None
    assert layout.tp * layout.pp * layout.dp == tasks and layout.dp == dp
    assert len(chunks) == layout.pp * layout.vp
    assert [layer for chunk in chunks for layer in chunk.layers] == list(range(layers))
    assert chunks[0].embedding and chunks[-1].loss
