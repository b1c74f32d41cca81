"""The first step of a run of distillation on the student's own answers, as transformers computes it in fp64."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from runs import metrics

from megabatch.ledger.reader import Reader
from megabatch.run_directory import RunDirectory


def apart_in_first_step(run: Path, student: Path, teacher: Path, *, beta: float) -> tuple[float, float, float]:
    """What the run logged as divergence; what it is by its ledger; and how far the log-probabilities in the ledger are
    from the student's at most. Temperature 1."""
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(one, dtype=torch.float64) for one in (student, teacher)
    ]
    (line, *_), total, count, largest = metrics(run), 0.0, 0, 0.0
    assert line["on_policy"] == 1.0
    for record in Reader(RunDirectory(run).ledger).records(1):
        ids = torch.tensor([[*record.prompt_ids, *record.ids]])
        with torch.no_grad():
            q, p = (model(ids).logits[0, len(record.prompt_ids) - 1 : -1].log_softmax(1) for model in models)
        own = q.gather(1, torch.tensor(record.ids)[:, None])[:, 0]
        largest = max(largest, float((own - torch.tensor(record.logps)).abs().max()))
        m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
        total += float((beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum())
        count += len(record.ids)
    return float(line["divergence"]), total / count, largest
