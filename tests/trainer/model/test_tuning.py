"""What of megatron-core and torch is worked around where a part of a model is frozen, and that it still has to be."""

from __future__ import annotations

from typing import Any

from rank_server import RankServer


def gradients_of_bias() -> tuple[Any, Any]:
    """Of a layer with a frozen weight, as megatron-core has it and as we do."""
    import torch
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megabatch.trainer.model.tuning import _keep_gradient_of_bias
    from megabatch.trainer.ranks import Ranks

    found = []
    with Ranks():
        config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
        for keep in (False, True):
            layer = ColumnParallelLinear(
                4,
                3,
                config=config,
                init_method=torch.nn.init.ones_,
                bias=True,
                skip_bias_add=False,
                gather_output=False,
            )
            layer.weight.requires_grad_(False)
            if keep:
                _keep_gradient_of_bias(layer)
            output, _ = layer(torch.ones(5, 1, 4, requires_grad=True))
            output.sum().backward()
            assert output.tolist() == (torch.full((5, 1, 3), 4.0) + layer.bias).tolist()
            found.append(None if layer.bias.grad is None else layer.bias.grad.tolist())
    return found[0], found[1]


def test_megatron_core_loses_the_gradient_of_a_bias_beside_a_frozen_weight(ranks: RankServer) -> None:
    ((theirs, ours),) = ranks.run(gradients_of_bias, world_size=1)
    assert theirs is None, "megatron-core has mended this: take `_keep_gradient_of_bias` away"
    assert ours == [5.0, 5.0, 5.0]


def kinds_of_products() -> tuple[bool, bool]:
    """Whether torch takes a gradient's product row by row: with a stride of its own in a dimension of 1, and plain."""
    import torch

    weight = torch.ones(8, 4)
    odd = torch.ones(1, 6, 8).transpose(0, 1)
    plain = odd.reshape(-1, 8).view(odd.shape)
    found = []
    for gradient in (odd, plain):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            gradient.matmul(weight)
        found.append(any(event.key == "aten::bmm" for event in profile.key_averages()))
    return found[0], found[1]


def test_torch_takes_such_a_product_row_by_row(ranks: RankServer) -> None:
    ((odd, plain),) = ranks.run(kinds_of_products, world_size=1)
    assert odd, "torch has mended this: take `_with_plain_gradient` away"
    assert not plain
