"""What megatron-core does without our changes: a test that fails says that a change is no longer needed."""

from __future__ import annotations

from rank_server import RankServer


def empty_rows() -> tuple[float, float]:
    """Tokens of a row that is padding alone, as the balancing loss divides by them: megatron-core's and ours."""
    import torch

    from megabatch.trainer import megatron_moe
    from megabatch.trainer.ranks import Ranks

    with Ranks() as ranks:
        nothing = {"routing_map": torch.zeros(3, 4, dtype=torch.bool), "topk": 2, "with_padding_mask": True}
        counts = (megatron_moe._count_tokens, megatron_moe.tokens_per_expert)
        return tuple(float(count(reduce_group=ranks.tp, **nothing)[2]) for count in counts)


def test_a_row_of_padding_alone_is_divided_by_no_token(ranks: RankServer) -> None:
    assert ranks.run(empty_rows, world_size=1) == [(0.0, 1.0)]


def padding_is_routed() -> tuple[int, int]:
    """Choices of experts for two tokens and a padding: megatron-core's and ours."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megabatch.trainer import megatron_moe
    from megabatch.trainer.ranks import Ranks

    with Ranks():
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=4, moe_router_topk=2,
            moe_ffn_hidden_size=8, moe_router_load_balancing_type="none",
        )  # fmt: skip
        groups = ProcessGroupCollection.use_mpu_process_groups()
        theirs, ours = TopKRouter(config, groups), TopKRouter(config, groups)
        megatron_moe.prepare(ours)
        hidden, mask = torch.randn(3, 1, 8), torch.tensor([[False], [False], [True]])
        return int(theirs(hidden, mask)[1].sum()), int(ours(hidden, mask)[1].sum())


def test_padding_is_routed_to_experts(ranks: RankServer) -> None:
    assert ranks.run(padding_is_routed, world_size=1) == [(6, 4)]


def places_as_bits() -> tuple[list[bool], list[int]]:
    """Padding and places of four tokens, taken the way that megatron-core takes a mask to its routers."""
    import torch

    from megabatch.trainer import megatron_moe

    mine_T = torch.tensor([0, 5, 131_071, 2**31 - 1])
    mask = megatron_moe.places(mine_T, torch.tensor([False, True, False, True]))[None]
    padding_T, places_T = megatron_moe._from_bits(megatron_moe._as_bits(mask).transpose(0, 1).bool())
    return padding_T.tolist(), places_T.tolist()


def test_places_of_tokens_travel_as_bits_of_a_mask(ranks: RankServer) -> None:
    expected = ([False, True, False, True], [0, 5, 131_071, 2**31 - 1])
    assert ranks.run(places_as_bits, world_size=1) == [expected]
