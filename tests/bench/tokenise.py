"""Making a token cache of 150,000 conversations against `datasets.map`, with as many processes, as whole processes.

Both read the same JSONL and render and tokenise with the same tokenizer. `map` keeps the ids alone; a cache knows
which tokens are learned and where each sample stands, and is on disk when it is named.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from pathlib import Path

from measure import Figure, alternated, median, sized

TIMES = sized(2, 1)
ROWS = sized(150_000, 600)
PROCESSES = 2
_WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
)


def tokenise() -> list[Figure]:
    """Processor and wall time of both, and their ratios, taken in turn."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        _make(folder)
        commands = [[sys.executable, __file__, which, name] for which in ("cache", "map")]
        ours, theirs = alternated(commands, times=TIMES)
    figures = []
    for what in ("cpu_s", "wall_s"):
        pairs = [(getattr(a, what), getattr(b, what)) for a, b in zip(ours, theirs, strict=True)]
        words = "processor" if what == "cpu_s" else "wall"
        note = f"{ROWS:,} rows, {PROCESSES} processes, {words} time, median of {TIMES}"
        figures += [
            Figure(name=f"tokenise, {words}", value=median([a for a, _ in pairs]), unit="s", note=note),
            Figure(name=f"datasets.map, {words}", value=median([b for _, b in pairs]), unit="s", note=note),
            Figure(name=f"tokenise, {words} against datasets.map", value=median([a / b for a, b in pairs]), unit="x",
                   target=0.7, note="pair by pair"),
        ]  # fmt: skip
    return figures


def _make(folder: Path) -> None:
    from megabatch.data.tokens.tokenizer import train_bpe

    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(least, most)))

    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(ROWS):
            turns = [{"role": "user", "content": text(10, 60)}, {"role": "assistant", "content": text(20, 150)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    train_bpe([text(50, 100) for _ in range(200)], vocab_size=500, out_dir=folder / "tokenizer")


def _cache(folder: Path) -> None:
    from megabatch.data.cache.token_cache import TokenCache
    from megabatch.data.rows.sources import resolve
    from megabatch.data.tokens.encoding import Encoding

    sources = resolve([str(folder / "rows.jsonl")])
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        TokenCache.build(sources, Encoding(tokenizer=folder / "tokenizer"), cache_dir=Path(cache), num_proc=PROCESSES)


def _map(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        os.environ.update(HF_HOME=cache, HF_DATASETS_OFFLINE="1")
        import datasets
        from transformers import AutoTokenizer

        datasets.disable_progress_bars()
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=cache)
        rows.map(
            lambda batch: dict(tokenizer.apply_chat_template(batch["messages"], return_dict=True)),
            batched=True,
            num_proc=PROCESSES,
            remove_columns=rows.column_names,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    {"cache": _cache, "map": _map}[sys.argv[1]](Path(sys.argv[2]))
