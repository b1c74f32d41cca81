"""Every family's table against a model that transformers saved: a bijection, shards by hand, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import by_hand
import numpy as np
import pytest
from cases import CASES
from safetensors.numpy import load_file

from megabatch.converters.families import FAMILIES, family_of
from megabatch.converters.family import Family
from megabatch.converters.mapping import Mapped
from megabatch.converters.safetensors_io import HfFolder, Writer
from megabatch.converters.shards import assemble, read_shard, shard_shape
from megabatch.errors import ConversionError
from megabatch.plan.shape import ModelShape

Saved = Callable[[str], Path]


def opened(folder: Path) -> tuple[Family, ModelShape, HfFolder]:
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    source = HfFolder(folder)
    return family, family.present(family.shape(config), source.names), source


def padded(mapped: Mapped) -> int | None:
    return by_hand.PADDED_VOCAB if mapped.split == "vocab" else None


def test_every_tensor_that_transformers_saves_is_in_the_table(case: str, saved: Saved) -> None:
    family, shape, folder = opened(saved(case))
    checked = family.check(shape, folder.tensors)
    aside = {*checked.carried, *family.copies(shape)}
    left = {name: info.shape for name, info in folder.tensors.items() if name not in aside}
    assert family.hf_tensors(shape) == left
    assert checked.duplicates == family.copies(shape)
    assert checked.ignored.keys() == checked.duplicates.keys()
    expected = CASES[case].expected(load_file(saved(case) / "model.safetensors"), shape)
    assert {(mapped.name, mapped.expert) for mapped in checked.tensors} == set(expected)


@pytest.mark.parametrize("tp", [1, 2])
def test_shards_equal_plain_numpy_and_go_back_bit_by_bit(case: str, tp: int, saved: Saved, tmp_path: Path) -> None:
    family, shape, folder = opened(saved(case))
    reference = load_file(saved(case) / "model.safetensors")
    expected = CASES[case].expected(reference, shape)
    checked = family.check(shape, folder.tensors)
    aside = {*checked.carried, *checked.duplicates}
    entries = {name: info for name, info in folder.tensors.items() if name not in aside}
    if any(mapped.split != "replicated" and _uneven(mapped, tp) for mapped in checked.tensors):
        pytest.skip("this shape does not divide")
    with Writer(tmp_path / "model.safetensors", entries) as writer:
        for mapped in checked.tensors:
            vocab = padded(mapped)
            shards = [read_shard(folder, mapped, tp_rank=r, tp_size=tp, padded_vocab=vocab) for r in range(tp)]
            for rank, shard in enumerate(shards):
                by_table = np.frombuffer(shard, np.float32)
                by_table = by_table.reshape(shard_shape(mapped, tp_size=tp, padded_vocab=vocab))
                np.testing.assert_array_equal(by_table, expected[mapped.name, mapped.expert].shard(rank, tp))
            for rows in assemble(mapped, shards, itemsize=4, padded_vocab=vocab):
                writer.write(rows.hf, rows.data, row_start=rows.row_start, index=rows.index)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == entries.keys()
    assert all(back[name].tobytes() == reference[name].tobytes() for name in back)


def _uneven(mapped: Mapped, tp: int) -> bool:
    try:
        shard_shape(mapped, tp_size=tp, padded_vocab=padded(mapped))
    except ConversionError:
        return True
    return False


def test_each_left_out_tensor_fails_by_name(case: str, saved: Saved) -> None:
    family, shape, folder = opened(saved(case))
    needed = [name for name in folder.names if name in family.hf_tensors(shape)]
    for name in needed[:: max(1, len(needed) // 12)]:
        tensors = folder.tensors
        del tensors[name]
        with pytest.raises(ConversionError, match=f"{name} .* is missing"):
            family.check(shape, tensors)


def test_config_written_for_a_shape_is_the_same_model_to_transformers(case: str, saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, shape, folder = opened(saved(case))
    if family.hf_config is None or family.untrainable(shape):
        pytest.skip("only families that are trained are made on the spot")
    (tmp_path / "config.json").write_text(json.dumps(family.hf_config(shape, dtype="float32", eos_token_id=3)))
    read = AutoConfig.from_pretrained(tmp_path)
    again = family.shape(json.loads(read.to_json_string(use_diff=False)))
    for name in (name for name in shape.__slots__ if name != "hf_config"):
        assert getattr(again, name) == getattr(shape, name), name
    (tmp_path / "model.safetensors").symlink_to(folder.path / "model.safetensors")
    info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert not any(info.values()), info


def test_every_family_has_a_case(saved: Saved) -> None:
    elsewhere = {"llama", "qwen2", "qwen3", "qwen3_moe"}
    covered = {family_of(json.loads((saved(name) / "config.json").read_text())).name for name in CASES}
    assert covered | elsewhere == set(FAMILIES)
