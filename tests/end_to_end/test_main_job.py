"""The main job: recipe, real Slurm over two nodes, megatron-core training, Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megabatch.data.cache.token_cache import TokenCache

from .conftest import STEPS, Training

pytestmark = pytest.mark.slurm


def test_the_commands_tell_what_became_of_it(uninterrupted: Training) -> None:
    [said] = json.loads(uninterrupted.megabatch("status", "--json"))
    assert (said["state"], said["step"], said["attempt"]) == ("completed", STEPS, 0)
    log = uninterrupted.megabatch("logs")
    assert f"step {STEPS} of {STEPS}" in log
    assert "Warning" not in log, "what libraries miss must not hide what a run says"
    assert uninterrupted.megabatch("logs", "--rank", "1").strip() == ""
    assert list((uninterrupted.files.path / "runs").glob("events.out.tfevents.*"))
    assert not list(uninterrupted.files.logs.glob("failed.*"))


def test_it_learned(uninterrupted: Training) -> None:
    losses = [line["eval_loss"] for line in uninterrupted.lines("eval")]
    assert losses[-1] < losses[0] / 2


def test_the_export_has_the_loss_that_the_trainer_measured(
    uninterrupted: Training, environment: dict[str, str]
) -> None:
    """Transformers and the trainer share nothing here but the tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    last = uninterrupted.lines("eval")[-1]
    validation = next(
        cache
        for path in Path(environment["MEGABATCH_CACHE"]).iterdir()
        if path.is_dir() and len(cache := TokenCache.open(path)) == 24
    )
    folder = uninterrupted.files.step(STEPS) / "hf"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total = count = 0.0
    with torch.no_grad():
        for sample in (validation[index] for index in range(len(validation))):
            ids, weights = torch.from_numpy(sample.ids.astype(np.int64)), torch.from_numpy(sample.weights)
            logps = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            total -= float((logps.gather(1, ids[1:, None])[:, 0] * weights[1:]).sum())
            count += float(weights[1:].sum())
            assert tokenizer.decode(sample.ids[sample.weights > 0]).endswith(tokenizer.eos_token)
    assert count == last["eval_loss_count"]
    assert total / count == pytest.approx(last["eval_loss"], abs=1e-6)
