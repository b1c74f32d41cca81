"""megatron-core's mixture of experts on rows with padding: every change in one place, with its reason and versions.

We exclude padding everywhere: it goes to no expert, uses no capacity and counts in no loss. megatron-core accepts a
padding mask from 0.16 on, but uses it only in the losses. Checked with megatron-core 0.16.0 and 0.16.1, which are
alike here.

Shapes: T tokens of this rank's part of a row, E experts. A token's place is its position in the whole row.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils, router
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_capacity
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, _DeepepManager
from torch import Tensor, nn


class Experts(MoELayer):
    """Accepts the tokens' places in a row that is split over context-parallel ranks (`places`) instead of the mask."""

    def forward(self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Any = None) -> Any:
        if padding_mask is not None and padding_mask.dtype != torch.bool:
            padding_mask = _as_bits(padding_mask)
        return super().forward(hidden_states, intermediate_tensors, padding_mask)


def places(mine_T: Tensor, padding_T: Tensor | None) -> Tensor:
    """int64 [T]: the place of each token in its whole row; for padding its bitwise complement, which is negative."""
    return mine_T if padding_T is None else torch.where(padding_T, ~mine_T, mine_T)


def _as_bits(places_1T: Tensor) -> Tensor:
    """bool [..., 32]: padding, and the bits of the place; to recompute a layer megatron-core passes only a mask."""
    padding = places_1T < 0
    place = torch.where(padding, ~places_1T, places_1T)[..., None]
    bits = place.bitwise_right_shift(torch.arange(31, device=place.device)).bitwise_and(1).bool()
    return torch.cat((padding[..., None], bits), dim=-1)


def _from_bits(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padding, bool [T], and places, int64 [T]."""
    bits = mask.reshape(-1, 32)
    return bits[:, 0], (bits[:, 1:] * (1 << torch.arange(31, device=mask.device))).sum(-1)


class Chosen:
    """A layer's choices of experts, in the place of megatron-core's own replay (0.16.1-0.19), which keeps one row at a
    time: it has no place for rows that a pipeline has in flight."""

    def __init__(self, routes: Any, places_T: Tensor, layer: int) -> None:
        """Args: routes: `routes.Table`; places_T: of the tokens in it; layer: from 0."""
        self._routes, self._places_T, self._layer = routes, places_T, layer

    def get_replay_topk(
        self, scores_TE: Tensor, topk: int, num_groups: Any = None, group_topk: Any = None, choose: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The chosen experts' scores and numbers, both [T, K]."""
        table_SK = self._routes.experts_SLK[:, self._layer]
        if self._routes.records:
            found_TK, chosen_TK = choose(scores_TE, topk, num_groups, group_topk)
            table_SK[self._places_T] = chosen_TK
            return found_TK, chosen_TK
        chosen_TK = table_SK[self._places_T]
        return scores_TE.gather(1, chosen_TK), chosen_TK


class Router(TopKRouter):
    """Routes no padding, and treats a row as a whole even if tensor or context parallelism splits it (0.16-0.19).

    megatron-core routes padding like tokens, gives each of these ranks its own capacity, and averages z-loss means
    over ranks that may have different numbers of tokens.
    """

    routes: Any = None
    """`routes.Table` of choices to record or to replay."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        """[..., E] → probabilities and choices, both [T, E]; padding_mask: bool [...], true at padding, or bits."""
        places_T = None
        if padding_mask is not None and padding_mask.dim() == 3:
            padding_mask, places_T = _from_bits(padding_mask)
        self.router_replay = None
        if self.routes is not None:
            assert places_T is not None and self.layer_number is not None, "the engine sends places"
            self.router_replay = Chosen(self.routes, places_T, self.layer_number - 1)
        probs_TE, chosen_TE = super().routing(logits, padding_mask=padding_mask, **more)
        real_T = None
        if padding_mask is not None:
            real_T = ~padding_mask.reshape(-1)
            probs_TE, chosen_TE = probs_TE * real_T[:, None], chosen_TE & real_T[:, None]
        if self.capacity_factor is not None:
            return self._within_capacity(probs_TE, chosen_TE, self._count(probs_TE, real_T), places_T)
        return probs_TE, chosen_TE

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Adds the gradient of coefficient * mean over the row's tokens of logsumexp(logits)^2.

        Source: arXiv:2202.08906, eq. 5.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares_T = torch.logsumexp(logits, dim=-1).square()
        real_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        if real_T is not None:
            squares_T = squares_T * real_T
        mean = squares_T.sum() / self._count(logits, real_T).clamp(min=1)
        return MoEAuxLossAutoScaler.apply(logits, mean * coefficient)

    def _count(self, rows: Tensor, real_T: Tensor | None) -> Tensor:
        """Tokens of the whole row, without padding."""
        if real_T is None:
            return torch.tensor(rows.shape[0] * self.tp_cp_group.size(), device=rows.device)
        count = real_T.sum()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(count, group=self.tp_cp_group)
        return count

    def _within_capacity(
        self, probs_TE: Tensor, chosen_TE: Tensor, count: Tensor, places_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Drops tokens above an expert's capacity of ceil(tokens * topk / E * factor) in the whole row."""
        assert self.capacity_factor is not None
        capacity = torch.ceil(count.double() * self.topk / self.num_experts * self.capacity_factor)
        kept_TE = chosen_TE & (self._earlier(probs_TE.detach(), chosen_TE, places_T) < capacity)
        if not self.config.moe_pad_expert_input_to_capacity:
            return probs_TE * kept_TE, kept_TE
        room = get_capacity(probs_TE.shape[0] * self.topk, self.num_experts, self.capacity_factor)
        return probs_TE * kept_TE, _ranked(kept_TE.to(torch.int8)) < room

    def _earlier(self, probs_TE: Tensor, chosen_TE: Tensor, places_T: Tensor | None) -> Tensor:
        """int64 [T, E]: tokens of the whole row that an expert takes before this one, by `moe_token_drop_policy`.

        Args: `places_T`: where this rank's tokens lie in the row; None where each rank has the next part of it.
        """
        tokens, first = probs_TE.shape[0], self.tp_cp_group.rank() * probs_TE.shape[0]
        mine_T = torch.arange(first, first + tokens, device=probs_TE.device) if places_T is None else places_T
        if self.config.moe_token_drop_policy == "position":
            probs_TE = -mine_T[:, None].float()
        scores_TE = self._of_row(torch.where(chosen_TE, probs_TE, float("-inf")))
        if places_T is not None:
            scores_TE = torch.empty_like(scores_TE).index_copy_(0, self._of_row(places_T), scores_TE)
        return _ranked(scores_TE)[mine_T]

    def _of_row(self, values_T: Tensor) -> Tensor:
        """Those of all ranks that have parts of the row, one behind the other."""
        if self.tp_cp_group.size() == 1:
            return values_T
        everyone = [torch.empty_like(values_T) for _ in range(self.tp_cp_group.size())]
        dist.all_gather(everyone, values_T.contiguous(), group=self.tp_cp_group)
        return torch.cat(everyone)


def _ranked(scores_TE: Tensor) -> Tensor:
    """int64 [T, E]: rank of each token in an expert's descending order; of equal scores, the earlier token first."""
    order_TE = scores_TE.argsort(dim=0, descending=True, stable=True)
    counted_TE = torch.arange(len(scores_TE), device=scores_TE.device)[:, None].expand_as(order_TE)
    return torch.empty_like(order_TE).scatter_(0, order_TE, counted_TE)


def prepare(model: nn.Module) -> None:
    """Gives a model's routers and expert layers our classes, and patches the functions around them in this process.

    Some versions name the router in specs, others in the layer itself; changing the class of the built objects works
    for all. We apply the capacity, so the routers' own configuration has none; the dispatchers keep theirs.
    """
    for module in model.modules():
        if type(module) is MoELayer:
            module.__class__ = Experts
        if type(module) is TopKRouter:
            module.__class__ = Router
            module.capacity_factor = module.config.moe_expert_capacity_factor
            module.config = copy.copy(module.config)
            module.config.moe_expert_capacity_factor = None
            router.get_tokens_per_expert_and_token_count = tokens_per_expert
            MoEAlltoAllTokenDispatcher.preprocess = _preprocess
            _DeepepManager.setup_metadata = _setup_metadata


_count_tokens = moe_utils.get_tokens_per_expert_and_token_count
_preprocess_all = MoEAlltoAllTokenDispatcher.preprocess
_setup_all = _DeepepManager.setup_metadata


def tokens_per_expert(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    """Makes the balancing loss of a row of only padding 0; 0.16 divides by its number of tokens."""
    per_expert_E, local, total = _count_tokens(*args, **kwargs)
    return per_expert_E, local, total.clamp(min=1) if isinstance(total, Tensor) else total


def _preprocess(dispatcher: Any, routing_map: Tensor) -> Tensor:
    """Fused permutation makes room for topk rows of each token, padding too: more than are sent (0.16-0.19)."""
    tokens: Tensor = _preprocess_all(dispatcher, routing_map)
    if dispatcher.config.moe_permute_fusion and not dispatcher.drop_and_pad:
        dispatcher.num_out_tokens = routing_map.sum()
        dispatcher._maybe_update_cuda_sync_point("before_permutation_1")
    return tokens


def _setup_metadata(manager: Any, routing_map: Tensor, probs: Tensor) -> None:
    """megatron-core takes a token's largest probabilities for its experts'. Padding has none, and would go to some
    experts with weight 0, unless there is a capacity (0.16-0.19). -1 stands for no expert."""
    _setup_all(manager, routing_map, probs)
    chosen_TE = routing_map.reshape(len(routing_map), manager.num_experts)
    none_TK = ~chosen_TE.gather(1, manager.token_indices.clamp(min=0))
    manager.token_indices = manager.token_indices.masked_fill(none_TK, -1)
