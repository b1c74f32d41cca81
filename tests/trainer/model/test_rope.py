"""Our rotation against transformers', and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from rank_server import RankServer


def rotations(positions: list[int], width: int) -> dict[str, float]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from megabatch.trainer.model.row import rotated

    generator = torch.Generator().manual_seed(0)
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.tensor(positions).double(), frequencies)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    query, key = (torch.randn(len(positions), n, width, generator=generator).double() for n in (3, 1))
    expected = apply_rotary_pos_emb(query[None], key[None], cos[None], sin[None], unsqueeze_dim=2)
    rotation = (cos[:, None], sin[:, None])
    off = max(float((rotated(x, rotation) - e[0]).abs().max()) for x, e in zip((query, key), expected, strict=True))
    wider = torch.randn(len(positions), 2, width + 4, generator=generator).double().requires_grad_()
    slopes = torch.autograd.gradcheck(lambda x: rotated(x, rotation), (wider,))
    passed = torch.equal(rotated(wider, rotation)[..., width:], wider[..., width:])
    return {"off": off, "slopes": float(slopes), "passed": float(passed)}


@pytest.mark.parametrize(("positions", "width"), [([0, 1, 2, 0, 1, 7], 8), ([5], 2)])
def test_equals_transformers(positions: list[int], width: int, ranks: RankServer) -> None:
    (found,) = ranks.run(rotations, world_size=1, positions=positions, width=width)
    assert found["off"] < 1e-12
    assert found["slopes"] == found["passed"] == 1
