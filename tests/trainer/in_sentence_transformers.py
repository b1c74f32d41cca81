"""Vectors and losses of sentence-transformers, in the environment that has it.

It needs scikit-learn, which transformers imports in each process where it is installed: it has an environment of its
own.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def _python() -> str | None:
    if importlib.util.find_spec("sentence_transformers"):
        return sys.executable
    beside = Path(sys.prefix, "peers", "bin", "python")
    return str(beside) if Path(sys.prefix, "peers", ".done").exists() else None


NEEDS_SENTENCE_TRANSFORMERS = pytest.mark.skipif(_python() is None, reason="needs sentence-transformers: make peers")


def asked(*questions: dict[str, Any]) -> list[Any]:
    """The answers of one process to questions for `vectors` or `loss`, whose arguments they name."""
    python = _python()
    assert python is not None
    told = subprocess.run(
        [python, __file__], input=json.dumps(questions), text=True, capture_output=True, timeout=600, check=False
    )
    assert told.returncode == 0, told.stderr
    answers: list[Any] = json.loads(told.stdout.splitlines()[-1])
    return answers


def vectors(folder: str, texts: list[str]) -> list[list[float]]:
    from sentence_transformers import SentenceTransformer

    found: list[list[float]] = SentenceTransformer(folder, device="cpu").encode(texts).tolist()
    return found


def loss(
    name: str, vectors: list[list[float]], parts: int, labels: list[float] | None, settings: dict[str, Any]
) -> tuple[float, list[list[float]]]:
    """The loss of that name and its gradient, given vectors in place of a model's; each `parts` of them are a row."""
    import torch
    from sentence_transformers import losses

    given = torch.tensor(vectors, requires_grad=True)
    features = [{"sentence_embedding": given[part::parts]} for part in range(parts)]
    made = getattr(losses, name)(model=lambda feature: feature, **settings)
    value = made(features, None if labels is None else torch.tensor(labels))
    (gradient,) = torch.autograd.grad(value, given)
    return float(value.detach()), gradient.tolist()


if __name__ == "__main__":
    print(json.dumps([{"vectors": vectors, "loss": loss}[each.pop("ask")](**each) for each in json.load(sys.stdin)]))
