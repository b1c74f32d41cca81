"""The divergence over a split vocabulary has the values and the gradient of fp64, and of TRL, in any chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_server import RankServer

from megabatch.trainer.ops import divergence
from megabatch.trainer.ops.divergence import Compared, divergences
from megabatch.trainer.ops.vocab import VocabShard

BETAS = (0.0, 0.3, 0.5, 1.0)
ROWS, SHARED, STUDENT, PADDED = 7, 13, 14, 20
"""The student has one token more than both together, and padding; with two ranks the second has four of the shared."""


def _case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the student and of the teacher, targets, and how each row counts, in both results."""
    draw = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(ROWS, PADDED, generator=draw) * 4 for _ in range(2))
    return student, teacher, torch.randint(0, SHARED, (ROWS,), generator=draw), torch.randn(2, ROWS, generator=draw)


def _reference(beta: float, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergences, gradient of the student's logits) in fp64, as written in the paper."""
    student, teacher, targets, counts = (part.double() if part.is_floating_point() else part for part in _case())
    student.requires_grad_()
    q, p = ((logits[:, :SHARED] / temperature).softmax(1) for logits in (student, teacher))

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(1)

    mixed = beta * p + (1 - beta) * q
    apart = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)
    logps = student[:, :SHARED].log_softmax(1).gather(1, targets[:, None])[:, 0]
    (apart * counts[0] + logps * counts[1]).sum().backward()
    assert student.grad is not None
    return torch.stack([apart, logps]).detach(), student.grad


def _found(shard: VocabShard, beta: float, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher, targets, counts = _case()
    mine = slice(shard.start, shard.start + shard.size)
    local = student[:, mine].clone().requires_grad_()
    compared = teacher[:, shard.start : shard.start + shard.real]
    how = Compared(beta=beta, temperature=temperature, teacher=lambda rows: compared[rows], shard=shard)
    both = torch.stack(divergences(local, targets, how))
    (both * counts).sum().backward()
    assert local.grad is not None
    return both.detach(), local.grad


def split(betas: list[float], temperature: float) -> list[tuple[Any, Any]]:
    """On each rank: values and its columns' gradient for each beta."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    width = PADDED // dist.get_world_size()
    shard = VocabShard(dist.get_rank() * width, width, SHARED, dist.group.WORLD)
    return [tuple(part.numpy() for part in _found(shard, beta, temperature)) for beta in betas]  # type: ignore[misc]


@pytest.mark.parametrize("chunk", [1, 45, 1 << 22])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradient_are_those_of_fp64(beta: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CPU_CHUNK_ELEMENTS", chunk)
    values, gradient = _found(VocabShard(0, PADDED, SHARED, None), beta, 0.7)
    expected = _reference(beta, 0.7)
    torch.testing.assert_close(values.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert not gradient[:, SHARED:].any()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_share_the_vocabulary_find_the_same(world_size: int, ranks: RankServer) -> None:
    """Of four ranks the last has padding alone."""
    found = ranks.run(split, world_size=world_size, betas=list(BETAS), temperature=0.7)
    for number, beta in enumerate(BETAS):
        expected = _reference(beta, 0.7)
        for rank in found:
            torch.testing.assert_close(torch.tensor(rank[number][0]).double(), expected[0], rtol=1e-5, atol=1e-6)
        gradient = torch.cat([torch.tensor(rank[number][1]) for rank in found], dim=1).double()
        torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_a_divergence_alone_is_trls(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher, _, _ = _case()
    theirs, mine = (student[:, :SHARED].clone().requires_grad_() for _ in range(2))
    expected = GKDTrainer.generalized_jsd_loss(
        theirs[None], teacher[None, :, :SHARED], labels=torch.zeros(1, ROWS), beta=beta, temperature=0.9
    )
    expected.backward()
    shard = VocabShard(0, SHARED, SHARED, None)
    how = Compared(beta=beta, temperature=0.9, teacher=lambda rows: teacher[rows, :SHARED], shard=shard)
    loss = divergences(mine, None, how)[0].mean()
    loss.backward()
    assert theirs.grad is not None and mine.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()
