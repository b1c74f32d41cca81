"""Rows of a generative reranker: the text of Qwen3-Reranker's model card, a sample for each document, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import QWEN3_THINKING

from megabatch.data.rows.files import Origin, Row
from megabatch.data.tokens.encoder import Encoder
from megabatch.data.tokens.encoding import Encoding
from megabatch.data.tokens.tokenizer import NO_ENTRY, entry, ids, load, train_bpe
from megabatch.errors import DataError

CARD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
WEB = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = train_bpe(["yes no " * 9], vocab_size=270, out_dir=tmp_path_factory.mktemp("tokenizer"))
    tokenizer = load(made)
    tokenizer.chat_template = QWEN3_THINKING
    tokenizer.save_pretrained(made)
    return made


def encoded(folder: Path, **fields: Any) -> Any:
    row = Row(Origin("rows.jsonl", 7, True), fields)
    return Encoder(Encoding(tokenizer=folder, rows="yes_no", instruction=WEB)).encode([row])


def test_each_document_is_asked_about_as_the_model_card_does(folder: Path) -> None:
    found = encoded(folder, query="capital of China?", positive="Beijing.", negatives=["Gravity.", "A pear."])
    tokenizer = load(folder)
    asked = [
        CARD.format(instruct=WEB, query="capital of China?", document=document)
        for document in ("Beijing.", "Gravity.", "A pear.")
    ]
    assert [tokenizer.decode(sample.ids) for sample in found.samples] == asked
    assert [sample.columns["fits"] for sample in found.samples] == [1, 0, 0]
    assert found.items == [3]


def test_a_system_turn_before_the_query_is_its_instruction(folder: Path) -> None:
    turns = [{"role": "system", "content": "Find code."}, {"role": "user", "content": "sort"}]
    found = encoded(folder, messages=turns, positive_messages=[[{"role": "assistant", "content": "sorted(x)"}]])
    assert load(folder).decode(found.samples[0].ids) == CARD.format(
        instruct="Find code.", query="sort", document="sorted(x)"
    )


def test_several_turns_are_refused_with_their_line(folder: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"rows.jsonl:7: has 2 turns where a generative reranker needs one"):
        encoded(folder, messages=turns, positive_messages=turns[:1])


def test_an_answer_is_an_entry_of_the_vocabulary(folder: Path) -> None:
    found = ids(folder)
    assert found is not None
    assert {"yes", "no", "<|im_end|>"} <= found.keys() and "maybe" not in found
    tokenizer = load(folder)
    assert found == tokenizer.get_vocab()
    assert tokenizer.convert_ids_to_tokens(entry(tokenizer, "yes", field="x")) == "yes"
    with pytest.raises(DataError, match=f"reranker.it='maybe' {NO_ENTRY}"):
        entry(tokenizer, "maybe", field="reranker.it")
