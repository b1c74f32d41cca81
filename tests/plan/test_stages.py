"""Splits of layers over pipeline stages, against megatron-core's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.plan.pipeline_layout import parse
from megabatch.plan.stages import chunks_of_counts, chunks_of_stages, even_counts, uneven_counts

SPLITS = [
    # layers, pp, vp, settings in megatron-core's names, counts in ours
    (8, 1, 1, {}, even_counts(8, pp=1, vp=1)),
    (8, 4, 1, {}, even_counts(8, pp=4, vp=1)),
    (8, 2, 2, {}, even_counts(8, pp=2, vp=2)),
    (8, 2, 4, {}, even_counts(8, pp=2, vp=4)),
    (7, 2, 1, {"account_for_embedding_in_pipeline_split": True}, even_counts(7, pp=2, vp=1, embedding=True)),
    (7, 2, 2, {"account_for_loss_in_pipeline_split": True}, even_counts(7, pp=2, vp=2, loss=True)),
    (
        6,
        2,
        2,
        {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
        even_counts(6, pp=2, vp=2, embedding=True, loss=True),
    ),
    (9, 2, 1, {"num_layers_in_first_pipeline_stage": 5}, uneven_counts(9, pp=2, vp=1, first=5, last=None)),
    (9, 3, 1, {"num_layers_in_last_pipeline_stage": 1}, uneven_counts(9, pp=3, vp=1, first=None, last=1)),
    (
        12,
        4,
        2,
        {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2},
        uneven_counts(12, pp=4, vp=2, first=2, last=2),
    ),
    (
        5,
        2,
        1,
        {"num_layers_in_first_pipeline_stage": 4, "num_layers_in_last_pipeline_stage": 1},
        uneven_counts(5, pp=2, vp=1, first=4, last=1),
    ),
]


def _megatron(layers, pp, vp, settings):
    """Layers of each chunk as megatron-core computes them, by (pipeline rank, chunk)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        pipeline_dtype=torch.float32,
        **settings,
    )
    held = {}
    for rank in range(pp):
        for stage in range(vp):
            vp_stage = stage if vp > 1 else None
            start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)
            count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
            held[rank, stage] = tuple(range(start, start + count))
    return held


@pytest.mark.parametrize(("layers", "pp", "vp", "settings", "counts"), SPLITS)
def test_counted_splits_are_megatron_cores(layers, pp, vp, settings, counts):
    chunks = chunks_of_counts(counts, pp=pp)
    assert {(chunk.pp_rank, chunk.vp_stage): chunk.layers for chunk in chunks} == _megatron(layers, pp, vp, settings)


@pytest.mark.parametrize("text", ["E|(t|)*3,m|m||L", "Ettt|(tt|)*5,m|L", "Et*3|t*2,|tL|", "E(t|t)*3L"])
def test_layout_strings_are_megatron_cores(text):
    layouts = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    rows = layouts.PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse(text) == tuple("".join(letters[layer.name] for layer in row) for row in rows)


def test_chunks_of_a_layout_string():
    chunks = chunks_of_stages(parse("E|t|tt|mL"), pp=2)
    assert [(chunk.pp_rank, chunk.vp_stage, chunk.layers) for chunk in chunks] == [
        (0, 0, ()),
        (1, 0, (0,)),
        (0, 1, (1, 2)),
        (1, 1, ()),
    ]
    assert [chunk.embedding for chunk in chunks] == [True, False, False, False]
    assert [chunk.loss for chunk in chunks] == [False, False, False, True]
    assert [chunk.mtp_layers for chunk in chunks] == [0, 0, 0, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 4))
def test_every_layer_is_held_once_in_order(counts, pp):
    counts = counts * pp
    chunks = chunks_of_counts(counts, pp=pp)
    assert [layer for chunk in chunks for layer in chunk.layers] == list(range(sum(counts)))
    assert [chunk.pp_rank for chunk in chunks] == list(range(pp)) * (len(counts) // pp)
    assert [chunk.embedding for chunk in chunks].count(True) == [chunk.loss for chunk in chunks].count(True) == 1
