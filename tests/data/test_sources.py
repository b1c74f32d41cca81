from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.rows import hub
from megabatch.data.rows.digests import Digests
from megabatch.data.rows.sources import Source, resolve
from megabatch.errors import DataError

Write = Callable[..., Path]


def read(*datasets: Any, seed: int = 0, shuffle: bool = True) -> list[Any]:
    return [row for s in resolve([str(d) for d in datasets]) for row in s.rows(seed=seed, shuffle=shuffle)]


def numbers(count: int) -> list[dict[str, Any]]:
    return [{"text": f"document {index}", "index": index} for index in range(count)]


def test_jsonl_rows_know_their_line_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "tw\xc3\xb6"}\n')
    rows = read(path)
    assert [(row.fields["text"], str(row.origin)) for row in rows] == [("one", f"{path}:1"), ("twö", f"{path}:3")]


def test_every_file_kind_gives_the_same_rows(tmp_path: Path, write_jsonl: Write) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = [{"question": 'a, "b"\n\nc?', "answer": "d"}, {"question": "e", "answer": "f"}]
    write_jsonl("x.jsonl", expected)
    (tmp_path / "x.json").write_text(json.dumps(expected, indent=1))
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(expected)
    pq.write_table(pa.Table.from_pylist(expected), tmp_path / "x.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert [row.fields for row in read(tmp_path / f"x.{suffix}")] == expected, suffix
    assert str(read(tmp_path / "x.parquet")[1].origin) == f"{tmp_path / 'x.parquet'}[row 1]"


def test_text_is_one_document_for_each_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\r\n\n  second\n")
    assert [row.fields for row in read(tmp_path / "a.txt")] == [{"text": "first"}, {"text": "  second"}]


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path, write_jsonl: Write) -> None:
    write_jsonl("data/b.jsonl", [{"text": "b"}])
    write_jsonl("data/a/z.jsonl", [{"text": "z"}])
    write_jsonl("data/.cache/c.jsonl", [{"text": "hidden"}])
    (tmp_path / "data" / "README.md").write_text("not data")
    assert [row.fields["text"] for row in read(tmp_path / "data")] == ["z", "b"]


def test_datasets_are_concatenated(write_jsonl: Write) -> None:
    first, second = write_jsonl("a.jsonl", [{"text": "a"}]), write_jsonl("b.jsonl", [{"text": "b"}])
    assert [row.fields["text"] for row in read(second, first)] == ["b", "a"]


def test_count_draws_a_seeded_subset(write_jsonl: Write) -> None:
    path = write_jsonl("a.jsonl", numbers(100))
    drawn = [[row.fields["index"] for row in read(f"{path}#30", seed=seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 30
    assert max(drawn[0]) >= 30, "not just the first rows"
    assert [row.fields["index"] for row in read(f"{path}#3", shuffle=False)] == [0, 1, 2]


def test_count_above_the_size_repeats_rows_evenly(write_jsonl: Write) -> None:
    path = write_jsonl("a.jsonl", numbers(4))
    times = Counter(row.fields["index"] for row in read(f"{path}#10"))
    assert sum(times.values()) == 10
    assert set(times.values()) == {2, 3}


@pytest.mark.parametrize("line", ['{"text": "a"', "not json", '{"text": NaN,}'])
def test_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "fine"}\n' * 4710 + line + "\n" + '{"text": "fine"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:4711: not valid JSON \(.*column \d+\); fix or delete"):
        read(path)


def test_other_faults_of_files_are_named(tmp_path: Path) -> None:
    def fault(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            read(tmp_path / name)
        return str(caught.value)

    assert "latin.jsonl:2: not UTF-8 (byte 0xe4 at column 12)" in fault(
        "latin.jsonl", b'{"text":1}\n{"text": "a\xe4"}'
    )
    assert "list.jsonl:1: is a JSON list" in fault("list.jsonl", b"[1]")
    assert "dict.json: holds a dict" in fault("dict.json", b'{\n"text": "a"}')
    assert "lines.json:2: not valid JSON" in fault("lines.json", b'{"a": 1}\n{"a": 2')
    assert "cut.json: not valid JSON" in fault("cut.json", b'[{"a": 1}, {"a"')
    assert "ragged.csv:3: must have the header's 2 cells" in fault("ragged.csv", b"a,b\n1,2\n1,2,3\n")
    assert "short.csv:2: must have the header's 2 cells" in fault("short.csv", b"a,b\n1\n")
    assert "quote.csv:2: not valid CSV" in fault("quote.csv", b'a,b\n"1"x,2\n')
    twice = "the key 'a' stands twice in one object"
    assert f"twice.jsonl:2: not valid JSON ({twice})" in fault("twice.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n')
    assert f"deep.jsonl:1: not valid JSON ({twice})" in fault("deep.jsonl", b'{"b": [{"a": {}, "a": {}}]}\n')
    assert f"twice.json: not valid JSON ({twice})" in fault("twice.json", b'[{"a": 1, "a": 2}]')
    assert "twice.csv:1: the header has the column 'b' twice" in fault("twice.csv", b"a,b,b\n1,2,3\n")
    digits = b'{"a": ' + b"1" * 5000 + b"}"
    for name in ("long.jsonl", "lines of long.json"):
        assert f"{name}:1: not valid JSON (a number has too many digits)" in fault(name, digits + b'\n{"a": 1}\n')
    assert "long.json: not valid JSON (a number has too many digits)" in fault("long.json", b"[" + digits + b"]")
    assert "bad.parquet: not readable as Parquet" in fault("bad.parquet", b"PAR1 nonsense")
    assert "empty.jsonl' is empty" in fault("empty.jsonl", b"\n")
    assert "is not a .jsonl, .json, .csv, .tsv, .parquet, .txt (the text ones also with .gz or .zst)" in fault(
        "data.xlsx", b""
    )
    assert "tabs.tsv:3: must have the header's 2 cells; quote cells that contain tabs" in fault(
        "tabs.tsv", b"a\tb\n1\t2\n1\t2\t3\n"
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "txt", "jsonl.gz"])
def test_another_unicode_encoding_is_named(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    content = '{"text": "a"}\n'.encode(encoding)
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(DataError, match=rf"is {name}, not UTF-8; convert the file: iconv -f {name} -t UTF-8"):
        read(path)


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == "gz":
        return gzip.compress(content)
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_give_the_rows_and_places_of_plain_ones(tmp_path: Path, suffix: str) -> None:
    contents = {
        "a.jsonl": b'{"text": "one"}\n\n{"text": "tw\xc3\xb6"}\n',
        "b.json": b'[{"text": "one"},\n {"text": "two"}]',
        "c.json": b'{"text": "one"}\n{"text": "two"}\n',
        "d.csv": b'text,more\n"a\nb",c\n',
        "e.tsv": b"text\tmore\na, b\tc\n",
        "f.txt": b"one\n\ntwo",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / "packed" / f"{name}.{suffix}").parent.mkdir(exist_ok=True)
        (tmp_path / "packed" / f"{name}.{suffix}").write_bytes(compress(content, suffix))
    for name in contents:
        plain, packed = read(tmp_path / name), read(tmp_path / "packed" / f"{name}.{suffix}")
        assert [row.fields for row in packed] == [row.fields for row in plain]
        assert [row.origin.number for row in packed] == [row.origin.number for row in plain]
    assert len(read(tmp_path / "packed")) == sum(len(read(tmp_path / name)) for name in contents)
    assert read(tmp_path / "e.tsv")[0].fields == {"text": "a, b", "more": "c"}
    assert [str(row.origin) for row in read(tmp_path / "c.json")] == [f"{tmp_path / 'c.json'}:{n}" for n in (1, 2)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flip", "not_compressed"])
def test_a_damaged_compressed_file_is_one_error_with_its_place(tmp_path: Path, suffix: str, damage: str) -> None:
    lines = b"".join(b'{"text": "%032x"}\n' % (number * 0x9E3779B97F4A7C15 % (1 << 128)) for number in range(20000))
    whole = compress(lines, suffix)
    middle = len(whole) // 2
    broken = {
        "cut": whole[:middle],
        "flip": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "not_compressed": lines,
    }[damage]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(broken)
    with pytest.raises(
        DataError, match=r"a\.jsonl\.\w+:\d+: (the compressed file is damaged or truncated|not )"
    ) as caught:
        read(path)
    if damage == "cut":
        assert int(str(caught.value).split(":")[1]) > 1
    assert not [entry for entry in tmp_path.iterdir() if entry != path], "nothing is unpacked to disk"


def test_zstandard_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(b'{"text": "a"}', "zst"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: reading \.zst needs pyarrow; pip install pyarrow"):
        read(path)


def test_missing_file_suggests_the_nearest_names(tmp_path: Path, write_jsonl: Write) -> None:
    write_jsonl("gsm8k_train.jsonl", numbers(1))
    with pytest.raises(DataError, match=r"does not exist; nearest in .*: gsm8k_train\.jsonl"):
        read(tmp_path / "gsm8k_tran.jsonl#5")
    with pytest.raises(DataError, match="there is no folder"):
        read(tmp_path / "nowhere" / "a.jsonl")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"has no \.jsonl"):
        read(tmp_path / "bare")


def test_what_is_suggested_for_a_missing_dataset_is_a_dataset(tmp_path: Path) -> None:
    for name in ("constraint.md", "constraints.bin", "constraints", ".constraints.jsonl"):
        (tmp_path / name).write_text("x")
    (tmp_path / "constraint").mkdir()
    (tmp_path / "constraint" / "notes.md").write_text("x")
    missing = tmp_path / "constraint.jsonl"
    with pytest.raises(DataError, match=rf"does not exist; {tmp_path} has no \.jsonl, .* file; check the path"):
        resolve([str(missing)])
    (tmp_path / "constraints.txt").write_text("x")
    with pytest.raises(DataError, match=r"does not exist; check the path$"):
        resolve([str(missing)])
    with pytest.raises(DataError, match=r"does not exist; nearest in .*: constraints\.txt$"):
        resolve([str(missing.with_suffix(".txt"))])
    (tmp_path / "constraints.jsonl.gz").write_bytes(b"")
    (tmp_path / "constraint" / "rows.csv").write_text("x")
    with pytest.raises(DataError, match=r"does not exist; nearest in ") as error:
        resolve([str(missing)])
    assert sorted(str(error.value).rpartition(": ")[2].split(", ")) == ["constraint", "constraints.jsonl.gz"]


def test_a_file_that_vanishes_is_one_clear_error(write_jsonl: Write) -> None:
    path = write_jsonl("a.jsonl", numbers(1))
    (source,) = resolve([str(path)])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file"):
        list(source.rows(seed=0, shuffle=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openai/gsm8k:main#500", ("hf", "openai/gsm8k:main", 500)),
        ("hf::openai/gsm8k", ("hf", "openai/gsm8k", None)),
        ("ms::AI-ModelScope/alpaca-gpt4-data-en#20000", ("ms", "AI-ModelScope/alpaca-gpt4-data-en", 20000)),
    ],
)
def test_hub_names(text: str, expected: tuple[Any, ...]) -> None:
    source = resolve([text])[0]
    assert (source.hub, source.name, source.count) == expected


def test_use_hf_chooses_the_hub_of_a_bare_name() -> None:
    assert resolve(["org/name"], use_hf=False) == [Source("org/name", hub="ms", name="org/name")]


def test_hub_out_of_reach_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._load.cache_clear()
    with pytest.raises(DataError, match=r"dataset hf::no-such/dataset-xyz: cannot be loaded.*no local path"):
        read("no-such/dataset-xyz")


def test_modelscope_says_which_package_it_needs() -> None:
    pytest.importorskip("datasets")
    try:
        import modelscope  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"pip install modelscope, or use .* hf::org/name"):
            read("ms::org/name")


def test_fingerprint_follows_the_content(write_jsonl: Write, tmp_path: Path) -> None:
    first, same = write_jsonl("a.jsonl", numbers(3)), write_jsonl("sub/b.jsonl", numbers(3))
    other = write_jsonl("c.jsonl", numbers(4))
    prints = [
        source.fingerprint(Digests(tmp_path / "none"))
        for source in resolve([str(first), str(same), str(other), f"{first}#2"])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_pipe_is_no_dataset(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl is a pipe, a socket or a device; write its rows to a regular"):
        resolve([str(tmp_path / "rows.jsonl")])


def test_a_cut_line_is_named_with_the_column_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "whole"}\n{"text": "b", "more":\n')
    with pytest.raises(DataError, match=r"cut\.jsonl:2: not valid JSON \(Expecting value at column 22\)"):
        read(path)
