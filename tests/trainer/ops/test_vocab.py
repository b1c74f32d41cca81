from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_server import RankServer

from megabatch.plan.memory import LOSS_CHUNK
from megabatch.trainer.ops import vocab
from megabatch.trainer.ops.vocab import VocabShard, token_collisions, token_entropies, token_logps


def _case(vocab_size: int, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(11, padded, generator=generator) * 5
    targets = torch.randint(0, vocab_size, (11,), generator=generator)
    return logits, targets, torch.randn(11, generator=generator)


def _reference(vocab_size: int, padded: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and gradient in fp64, with padding columns cut off."""
    logits, targets, weights = _case(vocab_size, padded)
    exact = logits.double().requires_grad_()
    logps = (exact[:, :vocab_size] / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    (logps * weights.double()).sum().backward()
    assert exact.grad is not None
    return logps.detach(), exact.grad


def _entropies(vocab_size: int, padded: int, temperature: float) -> torch.Tensor:
    """In fp64, with padding columns cut off."""
    logits, _, _ = _case(vocab_size, padded)
    return torch.distributions.Categorical(logits=logits.double()[:, :vocab_size] / temperature).entropy()


def _collisions(vocab_size: int, padded: int) -> torch.Tensor:
    logits, _, _ = _case(vocab_size, padded)
    return logits.double()[:, :vocab_size].softmax(1).square().sum(1).log()


def split_logps(vocab_size: int, padded: int) -> tuple[Any, Any, Any, Any]:
    """On each rank: log-probabilities, its columns' gradient, entropies at temperature 0.7, collisions."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    width = padded // dist.get_world_size()
    start = dist.get_rank() * width
    logits, targets, weights = _case(vocab_size, padded)
    local = logits[:, start : start + width].clone().requires_grad_()
    logps = token_logps(local, targets, VocabShard(start, width, vocab_size, dist.group.WORLD))
    (logps * weights).sum().backward()
    assert local.grad is not None
    shard = VocabShard(start, width, vocab_size, dist.group.WORLD)
    entropies = token_entropies(local, shard, temperature=0.7)
    return logps.detach().numpy(), local.grad.numpy(), entropies.numpy(), token_collisions(local, shard).numpy()


@pytest.mark.parametrize(("vocab_size", "padded"), [(13, 13), (13, 16)])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_equals_log_softmax_on_one_rank(
    vocab_size: int, padded: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", chunk)
    logits, targets, weights = _case(vocab_size, padded)
    logits.requires_grad_()
    logps = token_logps(logits, targets, VocabShard(0, padded, vocab_size, None))
    (logps * weights).sum().backward()
    expected, gradient = _reference(vocab_size, padded)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 0.9, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_divides_the_logits(temperature: float, dtype: torch.dtype) -> None:
    logits, targets, weights = _case(13, 16)
    logits, shard = logits.to(dtype).requires_grad_(), VocabShard(0, 16, 13, None)
    logps = token_logps(logits, targets, shard, temperature=temperature)
    (logps * weights).sum().backward()
    near = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.15}
    expected, gradient = _reference(13, 16, temperature)
    torch.testing.assert_close(logps.double(), expected, **near)
    torch.testing.assert_close(logits.grad.double(), gradient, **near)
    entropies = token_entropies(logits, shard, temperature=temperature)
    assert not entropies.requires_grad
    torch.testing.assert_close(entropies.double(), _entropies(13, 16, temperature), **near)


# 5 ids over 4 ranks of 2 columns: the last rank has nothing but padding
@pytest.mark.parametrize(("world_size", "vocab_size", "padded"), [(2, 16, 16), (2, 13, 16), (4, 5, 8)])
def test_split_vocabulary_gives_the_same_loss_and_gradient(
    world_size: int, vocab_size: int, padded: int, ranks: RankServer
) -> None:
    results = ranks.run(split_logps, world_size=world_size, vocab_size=vocab_size, padded=padded)
    expected, gradient = _reference(vocab_size, padded)
    for logps, _, entropies, collisions in results:
        torch.testing.assert_close(torch.from_numpy(logps).double(), expected, rtol=1e-5, atol=1e-5)
        of_all = _entropies(vocab_size, padded, 0.7)
        torch.testing.assert_close(torch.from_numpy(entropies).double(), of_all, rtol=1e-5, atol=1e-5)
        same = _collisions(vocab_size, padded)
        torch.testing.assert_close(torch.from_numpy(collisions).double(), same, rtol=1e-5, atol=1e-5)
    found = torch.cat([torch.from_numpy(grad) for _, grad, *_ in results], dim=1)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-5)


def test_half_precision_logits_are_reduced_in_fp32() -> None:
    logits, targets, _ = _case(13, 13)
    half = logits.bfloat16()
    exact = half.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    found = token_logps(half, targets, VocabShard(0, 13, 13, None))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_bfloat16_logits_give_the_numbers_of_their_fp32_copies() -> None:
    """Bit for bit: loss, and the gradient that the fp32 copy would pass on."""
    logits, targets, weights = _case(13, 16)
    shard = VocabShard(0, 16, 13, None)
    found = []
    for copy in (False, True):
        half = logits.bfloat16().requires_grad_()
        logps = token_logps(half.float() if copy else half, targets, shard)
        (logps * weights).sum().backward()
        found.append((logps.detach(), half.grad))
    assert found[0][0].dtype == torch.float32 and found[0][1].dtype == torch.bfloat16
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_the_plan_knows_the_chunk() -> None:
    assert vocab.CHUNK_ELEMENTS == LOSS_CHUNK
