"""What mbridge, mcore-bridge and Megatron-Bridge wrote comes back as the Hugging Face tensors it was read from."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from megabatch.converters import ConversionRequest, convert
from megabatch.converters.safetensors_io import HfFolder

PEERS = Path(__file__).parent / "peers"


@pytest.mark.parametrize("archive", sorted(PEERS.glob("*.tar.xz")), ids=lambda path: path.name.split(".")[0])
def test_a_peers_checkpoint_gives_back_the_tensors_it_was_made_of(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    made = tmp_path / archive.name.split(".")[0]
    convert(ConversionRequest(to_hf=True, mcore_model=made / "checkpoint", model=made), output_dir=tmp_path / "hf")

    folder = HfFolder(tmp_path / "hf")
    found = {}
    for name in folder.names:
        tensor = folder.read(name)
        found[name] = (tensor.dtype, list(tensor.shape), hashlib.sha256(tensor.data).hexdigest())
    dtypes = {"bfloat16": "BF16", "float32": "F32"}
    expected = json.loads((made / "hugging_face.json").read_text())
    assert found == {name: (dtypes[dtype], shape, digest) for name, (dtype, shape, digest) in expected.items()}
