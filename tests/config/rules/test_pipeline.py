"""Pipeline splits."""

from __future__ import annotations

import pytest

from megabatch.config.rules import pipeline

PP = "pipeline_model_parallel_size"
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
CHUNKS, CHUNK_LAYERS = "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"
LAYOUT = "pipeline_model_parallel_layout"


def split(**fields):
    return {"parallel": {PP: 2, **fields}}


CASES = [
    # rule, base, changes that break it, changes that keep it, field, words of the fault
    (
        pipeline.splits_exclude_each_other,
        "dense",
        split(**{LAYOUT: "Ett|ttL", FIRST: 2}),
        split(**{LAYOUT: "Ett|ttL"}),
        FIRST,
        ["cannot be combined with pipeline_model_parallel_layout"],
    ),
    (
        pipeline.splits_exclude_each_other,
        "dense",
        split(**{LAST: 1, LOSS: True}),
        split(**{LAST: 1, FIRST: 3}),
        LOSS,
        [f"cannot be combined with {LAST}", "try False"],
    ),
    (
        pipeline.splits_exclude_each_other,
        "dense",
        split(**{LAST: 1, CHUNK_LAYERS: 1}),
        split(**{LAST: 2, CHUNKS: 2}),
        CHUNK_LAYERS,
        [f"give {CHUNKS} instead"],
    ),
    (
        pipeline.splits_exclude_each_other,
        "dense",
        split(**{CHUNKS: 2, CHUNK_LAYERS: 1}),
        split(**{CHUNK_LAYERS: 1}),
        CHUNK_LAYERS,
        ["give one of them"],
    ),
    (
        pipeline.splits_need_stages,
        "dense",
        {"parallel": {CHUNKS: 2}},
        split(**{CHUNKS: 2}),
        CHUNKS,
        [f"{PP} above 1"],
    ),
    (
        pipeline.splits_need_stages,
        "dense",
        {"parallel": {LAYOUT: "Ett|ttL"}},
        split(**{LAYOUT: "Ett|ttL"}),
        LAYOUT,
        [f"{PP} above 1"],
    ),
    (
        pipeline.layout_string_fits,
        "dense",
        split(**{LAYOUT: "E|tt|ttL|"}),
        split(**{LAYOUT: "E|tt|tt|L"}),
        LAYOUT,
        ["must end with the loss L"],
    ),
    (
        pipeline.layers_divide_evenly,
        "given dense",
        {"parallel": {PP: 3}},
        {"parallel": {PP: 4}},
        PP,
        ["num_layers=4", "try 2 or 4"],
    ),
    (
        pipeline.layers_divide_evenly,
        "dense",
        split(**{EMBEDDING: True}),
        split(**{EMBEDDING: True, LOSS: True}),
        PP,
        [EMBEDDING, "together 5"],
    ),
    (
        pipeline.layers_divide_evenly,
        "dense",
        split(**{CHUNKS: 3}),
        split(**{CHUNKS: 2}),
        CHUNKS,
        ["the 2 layers of a stage", "try 2 or 1"],
    ),
    (
        pipeline.layers_divide_evenly,
        "dense",
        {"parallel": {PP: 2, CHUNK_LAYERS: 4}, "model": {"num_layers": 12}},
        {"parallel": {PP: 2, CHUNK_LAYERS: 3}, "model": {"num_layers": 12}},
        CHUNK_LAYERS,
        ["the 6 layers of a stage", "try 3 or 2"],
    ),
    (
        pipeline.layers_divide_unevenly,
        "dense",
        {"parallel": {PP: 4, FIRST: 2}},
        {"parallel": {PP: 4, FIRST: 1}},
        FIRST,
        ["leaves 2 layers", "other 3 stages", "try 1"],
    ),
    (
        pipeline.layers_divide_unevenly,
        "dense",
        split(**{FIRST: 2, LAST: 1}),
        split(**{FIRST: 3, LAST: 1}),
        FIRST,
        ["leaves 1 of the model's 4 layers for the other 0 stages"],
    ),
    (
        pipeline.layers_divide_unevenly,
        "dense",
        split(**{FIRST: 5}),
        split(**{FIRST: 3}),
        FIRST,
        ["leaves -1 of the model's 4 layers"],
    ),
    (
        pipeline.layers_divide_unevenly,
        "dense",
        {"parallel": {PP: 2, FIRST: 3, CHUNKS: 2}, "model": {"num_layers": 5}},
        {"parallel": {PP: 2, FIRST: 2, CHUNKS: 2}, "model": {"num_layers": 6}},
        CHUNKS,
        [f"must divide {FIRST}=3"],
    ),
    (
        pipeline.layout_string_fits,
        "dense",
        split(**{LAYOUT: "Ett|tx|L"}),
        split(**{LAYOUT: "E|t*2|t*2|L"}),
        LAYOUT,
        ["position 6", "'x'"],
    ),
    (
        pipeline.layout_string_fits,
        "dense",
        split(**{LAYOUT: "Et|tt|tL"}),
        split(**{LAYOUT: "Et|tt|t|L"}),
        LAYOUT,
        ["3 stages", "multiple of pp=2"],
    ),
    (
        pipeline.layout_string_fits,
        "given dense",
        split(**{LAYOUT: "Ett|tL"}),
        split(**{LAYOUT: "Ettt|tL"}),
        LAYOUT,
        ["has 3 transformer layers t", "num_layers=4"],
    ),
    (
        pipeline.layout_string_fits,
        "dense",
        split(**{LAYOUT: "Et|t|t|tL", CHUNKS: 4}),
        split(**{LAYOUT: "Et|t|t|tL", CHUNKS: 2}),
        CHUNKS,
        ["must be 2", "4 stages over pp=2"],
    ),
    (
        pipeline.layout_string_fits,
        "dense",
        {**split(**{LAYOUT: "Ettm|ttL"}), "mtp": {"mtp_num_layers": 1}},
        {**split(**{LAYOUT: "Ett|ttmL"}), "mtp": {"mtp_num_layers": 1}},
        LAYOUT,
        ["t after MTP layers m"],
    ),
    (
        pipeline.layout_string_fits,
        "dense",
        split(**{LAYOUT: "Ett|ttmL"}),
        split(**{LAYOUT: "Ett|ttL"}),
        LAYOUT,
        ["has 1 MTP layers m", "mtp_num_layers is 0"],
    ),
    (
        pipeline.layout_string_fits,
        "dense",
        split(**{LAYOUT: "ttE|ttL"}),
        split(**{LAYOUT: "E|ttttL"}),
        LAYOUT,
        ["must begin with the embedding E"],
    ),
    (
        pipeline.layout_string_fits,
        "dense",
        split(**{LAYOUT: "Ett|tt"}),
        split(**{LAYOUT: "Et|tttL"}),
        LAYOUT,
        ["must end with the loss L"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_rule(prove, case):
    rule, base, breaks, keeps, field, words = case
    prove(rule, base, breaks, keeps, f"parallel.{field}", words)


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(pipeline.RULES)


def test_rules_about_layers_wait_for_the_shape(judge):
    unknown = {"model": {"num_layers": None}, "parallel": {PP: 3, FIRST: 7}}
    for rule in pipeline.RULES:
        assert judge(rule, "dense", unknown) == []
