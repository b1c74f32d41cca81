"""How long ranks take to communicate: which groups stay inside a node, and bandwidth between the others.

We number ranks as megatron-core does: tensor parallel ranks vary fastest, then context, data and pipeline parallel
ones; for experts: expert tensor, expert, expert data and pipeline parallel ones.
"""

from __future__ import annotations

from megabatch.plan.gpus import Gpu
from megabatch.plan.settings import Settings
from megabatch.values import dataclass

LINK_EFFICIENCY = 0.75
"""Fraction of a link's bandwidth that NCCL reaches with large messages."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate: how many, and the stride between neighbours' rank numbers."""

    size: int
    stride: int


def groups(settings: Settings) -> dict[str, Group]:
    """tp, cp, dp (with cp, over which gradients are added up too), ep, etp, edp and pp."""
    layout = settings.layout
    return {
        "tp": Group(layout.tp, 1),
        "cp": Group(layout.cp, layout.tp),
        "dp": Group(layout.dp * layout.cp, layout.tp),
        "etp": Group(layout.etp, 1),
        "ep": Group(layout.ep, layout.etp),
        "edp": Group(layout.edp, layout.ep * layout.etp),
        "pp": Group(layout.pp, layout.world_size // layout.pp),
    }


def leaves_node(group: Group, *, gpus_per_node: int) -> bool:
    return group.size > 1 and group.size * group.stride > gpus_per_node


def ring_s(gpu: Gpu, group: Group, size: float, *, gpus_per_node: int) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes, the whole tensor's.

    Each rank sends (n - 1) / n of it; where a ring leaves a node, it uses the network adapters of all its ranks there.
    """
    if group.size == 1:
        return 0.0
    bandwidth = gpu.nvlink_gb_s
    if leaves_node(group, gpus_per_node=gpus_per_node):
        inside = max(1, gpus_per_node // group.stride)
        bandwidth = min(bandwidth, inside * gpu.network_gb_s)
    return size * (group.size - 1) / group.size / _bytes_per_s(bandwidth)


def all_to_all_s(gpu: Gpu, group: Group, size: float, *, gpus_per_node: int) -> float:
    """Seconds in which each rank sends `size` bytes, an equal part to each rank of the group, itself included."""
    if group.size == 1:
        return 0.0
    inside = min(group.size, max(1, gpus_per_node // group.stride))
    within = size * (inside - 1) / group.size / _bytes_per_s(gpu.nvlink_gb_s)
    across = size * (group.size - inside) / group.size / _bytes_per_s(gpu.network_gb_s)
    return max(within, across)


def send_s(gpu: Gpu, group: Group, size: float, *, gpus_per_node: int) -> float:
    """Seconds of `size` bytes to the next rank of a group."""
    if group.size == 1:
        return 0.0
    across = group.stride >= gpus_per_node
    return size / _bytes_per_s(gpu.network_gb_s if across else gpu.nvlink_gb_s)


def _bytes_per_s(gb_s: float) -> float:
    return gb_s * 1e9 * LINK_EFFICIENCY
