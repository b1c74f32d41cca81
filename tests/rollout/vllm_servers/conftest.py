"""One vLLM server for all tests of this folder; those that end it come last."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from vllm_server import Running, made, start

from megabatch.errors import RolloutError
from megabatch.rollout.vllm.server import Server
from megabatch.slurm.ports import free_port_block


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from megabatch.data.tokens.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("server")
    made(0).save_pretrained(folder)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder)
    found = start(folder, free_port_block())
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="package")
def server(running: Running) -> Iterator[Server]:
    found = running.server()
    try:
        found.wait()
    except RolloutError as e:
        raise AssertionError(f"{e}; {(running.folder / 'server.log').read_text()[-3000:]}") from e
    yield found
    found.close()
