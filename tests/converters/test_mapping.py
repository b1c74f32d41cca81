"""Faults of a table are found without a checkpoint; cuts that do not divide; the size of the biggest tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megabatch.converters.bijection import TensorInfo, invert
from megabatch.converters.families import family_named
from megabatch.converters.family import Family
from megabatch.converters.mapping import GateUp, Mapped, Piece, Rename, hf_names
from megabatch.converters.shards import assemble, hf_writes, shard_reads, shard_shape
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape


def moe_shape(**changes: object) -> ModelShape:
    config: dict[str, object] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 128, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0],
    }  # fmt: skip
    return family_named("qwen3_moe").shape(config | changes)


def mapped(*pieces: Piece, split: str = "column", tail: tuple[int, ...] = (4,)) -> Mapped:
    rows = sum(piece.count for piece in pieces)
    return Mapped("ours", None, None, (rows, *tail), split, (pieces,))  # type: ignore[arg-type]


def test_placeholders() -> None:
    assert hf_names("l.{l}.e.{e}.{a,b2}.w", layer=3, expert=11) == ("l.3.e.11.a.w", "l.3.e.11.b2.w")
    assert hf_names("plain") == ("plain",)


def test_layer_order() -> None:
    names = [mapped.name for mapped in family_named("qwen3_moe").tensors(moe_shape())]
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("decoder.layers.")]
    assert layers == sorted(layers)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([mapped(Piece("hf", (0, 2))), replace(mapped(Piece("hf", (1, 4))), name="b")], "rows 1 to 2 are used twice"),
        ([mapped(Piece("hf", (1, 4)))], "rows 0 to 1 are left out"),
        ([mapped(Piece("hf", (0, 2)), Piece("hf", (3, 4)))], "rows 2 to 3 are left out"),
        ([mapped(Piece("hf", (0, 2))), mapped(Piece("other", (0, 2)))], "ours is built by two entries"),
        ([mapped(Piece("hf", (0, 2))), replace(mapped(Piece("hf", (2, 4)), tail=(5,)), name="b")], "two row lengths"),
        ([mapped(Piece("hf", (0, 2), 1))], "unequal or missing leading indices"),
        ([mapped(Piece("hf", (0, 2), 0), Piece("hf", (0, 3), 1))], "unequal or missing leading indices"),
        ([mapped(Piece("hf", (0, 2), 0)), replace(mapped(Piece("hf", (0, 2))), name="b")], "leading indices"),
        ([replace(mapped(Piece("hf", (0, 2))), shape=(3, 4))], "its pieces have 2 rows"),
    ],
)
def test_faults_of_a_table(tensors: list[Mapped], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        invert(tensors)


def test_a_row_that_forgets_a_tensor_fails_against_the_checkpoint() -> None:
    family, shape = family_named("qwen3_moe"), moe_shape()
    found = {name: TensorInfo("BF16", dims) for name, dims in family.hf_tensors(shape).items()}
    for row in family.rows:
        less: Family = replace(family, rows=tuple(other for other in family.rows if other is not row))
        if row.applies(shape):
            with pytest.raises(ConversionError, match="is left over"):
                less.check(shape, found)


def test_uneven_cuts_name_tensor_and_entry() -> None:
    table = {tensor.name: tensor for tensor in family_named("qwen3_moe").tensors(moe_shape())}
    with pytest.raises(ConversionError, match=r"linear_qkv.weight.* 96 rows do not divide into 7 .*Qkv\("):
        shard_reads(table["decoder.layers.0.self_attention.linear_qkv.weight"], tp_rank=0, tp_size=7)
    with pytest.raises(ConversionError, match=r"linear_proj.weight.* 64 columns do not divide into 3"):
        shard_reads(table["decoder.layers.0.self_attention.linear_proj.weight"], tp_rank=0, tp_size=3)
    with pytest.raises(ConversionError, match="100 padded rows do not divide into 8"):
        shard_shape(table["output_layer.weight"], tp_size=8)
    with pytest.raises(ConversionError, match="96 padded rows are too few"):
        shard_reads(table["output_layer.weight"], tp_rank=0, tp_size=8, padded_vocab=96)
    with pytest.raises(ConversionError, match="shard 1 has 3 bytes"):
        list(assemble(mapped(Piece("hf", (0, 4)), split="row"), [bytes(32), bytes(3)], itemsize=4))


def test_a_rank_of_padding_only_reads_nothing() -> None:
    output = family_named("qwen3_moe").tensors(moe_shape())[-1]
    assert shard_shape(output, tp_size=4, padded_vocab=160) == (40, 64)
    assert [read.rows for read in shard_reads(output, tp_rank=2, tp_size=4, padded_vocab=160)] == [(80, 100)]
    assert shard_reads(output, tp_rank=3, tp_size=4, padded_vocab=160) == []


def test_writes_cover_each_tensor_once() -> None:
    family, shape = family_named("qwen3_moe"), moe_shape()
    sizes = {name: dims[0] for name, dims in family.hf_tensors(shape).items()}
    cells: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for tensor in family.tensors(shape):
        padded_vocab = 104 if tensor.split == "vocab" else None
        for write in hf_writes(tensor, tp_size=4, padded_vocab=padded_vocab):
            assert write.shard_rows[1] - write.shard_rows[0] == write.rows[1] - write.rows[0]
            left = write.cols[0] if write.cols else 0
            cells[write.hf] += [(row, left) for row in range(*write.rows)]
    for name, rows in cells.items():
        assert len(set(rows)) == len(rows), name
        assert {row for row, _ in rows} == set(range(sizes[name])), name


def test_joining_in_blocks_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = mapped(Piece("a", (0, 5)), Piece("b", (2, 4)), split="row", tail=(6,))
    shards = [bytes(range(rank * 42, rank * 42 + 42)) for rank in range(2)]
    tensor = replace(tensor, shape=(7, 12))
    whole = [(rows.hf, rows.row_start, bytes(rows.data)) for rows in assemble(tensor, shards, itemsize=1)]
    assert [(name, start) for name, start, _ in whole] == [("a", 0), ("b", 2)]
    assert whole[0][2][:12] == shards[0][:6] + shards[1][:6]
    monkeypatch.setattr("megabatch.converters.shards.BLOCK_BYTES", 24)
    blocks = [(rows.hf, rows.row_start, bytes(rows.data)) for rows in assemble(tensor, shards, itemsize=1)]
    assert [(name, start) for name, start, _ in blocks] == [("a", 0), ("a", 2), ("a", 4), ("b", 2)]
    assert b"".join(data for *_, data in blocks) == b"".join(data for *_, data in whole)


def test_a_trillion_parameters_are_planned() -> None:
    """The shape of the largest open models: 61 layers of 384 experts."""
    shape = moe_shape(num_hidden_layers=61, num_experts=384, hidden_size=7168, moe_intermediate_size=2048)
    tensors = family_named("qwen3_moe").tensors(shape)
    assert len(invert(tensors)) > 60 * 384 * 3
    assert len(tensors) > 60 * 384 * 2


def test_rows_say_what_they_are() -> None:
    assert str(GateUp("ours", "{gate,up}", ("ffn", "hidden"))) == "GateUp(ours <- {gate,up})"
    assert str(Rename("ours", "theirs", ("hidden",))) == "Rename(ours <- theirs)"
