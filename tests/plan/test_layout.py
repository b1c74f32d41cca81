"""Layouts: sizes multiply back, or there is no layout."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megabatch.plan.layout import layout

size = st.integers(1, 8)


@given(world=st.integers(1, 64), tp=size, pp=size, cp=size, ep=size, etp=size, micro=size, total=st.integers(1, 128))
def test_sizes_multiply_back_or_nothing_is_planned(*, world, tp, pp, cp, ep, etp, micro, total):
    found = layout(
        world_size=world,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        etp=etp,
        micro_batch_size=micro,
        global_batch_size=total,
    )
    fits = world % (tp * pp * cp) == 0 and world % (etp * ep * pp) == 0
    fits = fits and total % (micro * (world // (tp * pp * cp))) == 0
    assert (found is not None) == fits
    if found is not None:
        assert found.tp * found.pp * found.cp * found.dp == world
        assert found.etp * found.ep * found.pp * found.edp == world
        assert found.num_microbatches * micro * found.dp == total


def test_experts_have_their_own_data_parallel_size():
    found = layout(world_size=16, tp=4, pp=2, ep=4, global_batch_size=16)
    assert found is not None
    assert (found.dp, found.edp, found.num_microbatches) == (2, 2, 8)
