"""Learning rates of every decay style against curves computed by hand, and a run that is cut goes on along them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from runs import curve, metrics, recipe, train, write_run

from megabatch.config.optimization import LearningRate, Optimizer
from megabatch.errors import ConfigError
from megabatch.run_directory import ExitCode
from megabatch.trainer.megatron_cpu import adapt

LAST, WARMUP, DECAY, PEAK, FLOOR = 100, 10, 40, 1e-3, 1e-4


def _rates(**fields: Any) -> list[float]:
    return [rate for rate, _ in _course(Optimizer(), **fields)]


def _course(group: Optimizer, **fields: Any) -> list[tuple[float, float]]:
    """Learning rate and weight decay of each step."""
    adapt()
    from megabatch.trainer.optimizer import schedule_of

    rate = LearningRate(lr=PEAK, min_lr=FLOOR, lr_warmup_iters=WARMUP, lr_decay_iters=LAST, **fields)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    schedule = schedule_of(optimizer, rate, group, train_iters=LAST)
    found = []
    for _ in range(LAST + 2):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
        schedule.step(1)
    return found


@pytest.mark.parametrize(
    ("style", "falls"),
    [
        ("exponential", lambda r: 2 * 0.5**r - 1),
        ("linear", lambda r: 1 - r),
        ("cosine", lambda r: (1 + math.cos(math.pi * r)) / 2),
        ("minus_sqrt", lambda r: 1 - math.sqrt(r)),
    ],
)
def test_wsd_is_stable_until_its_decay(style: Any, falls: Any) -> None:
    rates = _rates(lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_iters=DECAY)
    assert rates[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(WARMUP)])
    assert rates[WARMUP : LAST - DECAY + 1] == pytest.approx([PEAK] * (LAST - DECAY - WARMUP + 1))
    for step in range(LAST - DECAY, LAST + 1):
        part = falls((step - (LAST - DECAY)) / DECAY)
        assert rates[step] == pytest.approx(FLOOR + (PEAK - FLOOR) * part), step
    assert rates[LAST + 1] == FLOOR


def test_inverse_square_root_falls_from_the_end_of_warmup() -> None:
    rates = _rates(lr_decay_style="inverse-square-root")
    assert rates[WARMUP] == pytest.approx(PEAK)
    for step in range(WARMUP, LAST + 1):
        assert rates[step] == pytest.approx(max(FLOOR, PEAK * math.sqrt(WARMUP / step))), step
    assert rates[LAST + 1] == FLOOR


def test_warmup_begins_where_it_is_told_to() -> None:
    first = PEAK / 4
    rates = _rates(lr_warmup_init=first)
    assert rates[: WARMUP + 1] == pytest.approx([first + (PEAK - first) * step / WARMUP for step in range(WARMUP + 1)])


@pytest.mark.parametrize(
    ("style", "rises"), [("linear", lambda r: r), ("cosine", lambda r: (1 - math.cos(math.pi * r)) / 2)]
)
def test_weight_decay_rises_over_the_run(style: Any, rises: Any) -> None:
    first, last = 0.02, 0.1
    group = Optimizer(weight_decay_incr_style=style, start_weight_decay=first, end_weight_decay=last)
    decays = [decay for _, decay in _course(group)]
    assert decays == pytest.approx([first + (last - first) * rises(min(step / LAST, 1)) for step in range(LAST + 2)])


def test_a_decay_that_does_not_fit_is_refused_once_the_length_is_known() -> None:
    with pytest.raises(ConfigError, match="lr_wsd_decay_iters=91 must be at most 90"):
        _rates(lr_decay_style="WSD", lr_wsd_decay_iters=91)


@pytest.mark.parametrize("style", ["WSD", "inverse-square-root"])
def test_a_run_that_was_cut_goes_on_along_its_curve(style: str, ranks: RankServer, tmp_path: Path) -> None:
    rate: dict[str, Any] = {"lr_decay_style": style, "lr_warmup_iters": 2}
    if style == "WSD":
        rate |= {"lr_wsd_decay_iters": 3, "lr_wsd_decay_style": "minus_sqrt"}
    decay = {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.0, "end_weight_decay": 0.4}
    groups: dict[str, Any] = {
        "learning_rate": rate,
        "optimizer": decay,
        "training": {"train_iters": 8},
        "batch": {"micro_batch_size": 1, "global_batch_size": 2},
    }
    whole, cut = (write_run(recipe(tmp_path, "qwen3", **groups), tmp_path / name) for name in ("whole", "cut"))
    ranks.run(train, world_size=1, run_dir=str(whole))
    assert ranks.run(train, world_size=1, run_dir=str(cut), stop_after=6) == [ExitCode.REQUEUE]
    ranks.run(train, world_size=1, run_dir=str(cut))
    assert curve(cut) == curve(whole)
    assert [m["learning_rate"] for m in metrics(cut)] == [m["learning_rate"] for m in metrics(whole)]


def test_norms_of_queries_and_keys_decay_if_asked_to(ranks: RankServer, tmp_path: Path) -> None:
    for decays in (False, True):
        made = recipe(tmp_path, "qwen3", optimizer={"apply_wd_to_qk_layernorm": decays})
        run = write_run(made, tmp_path / str(decays))
        (multipliers,) = ranks.run(_decay_multipliers, world_size=1, run_dir=str(run))
        assert multipliers["self_attention.q_layernorm.weight"] == multipliers["self_attention.k_layernorm.weight"]
        assert multipliers["self_attention.q_layernorm.weight"] == float(decays)
        assert multipliers["input_layernorm.weight"] == 0.0
        assert multipliers["mlp.linear_fc1.weight"] == 1.0


def _decay_multipliers(run_dir: str) -> dict[str, float]:
    """Of each parameter of the first layer, what its weight decay is multiplied with."""
    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        engine = assemble.build_engine(run, ranks, train_iters=4)
        assert engine.optimizer is not None
        (inner,) = engine.optimizer.inner
        groups: dict[str, float] = {}
        for name, parameter in engine.model.chunks[0].decoder.layers[0].named_parameters():
            place = inner.model_param_group_index_map[parameter][0]
            groups[name] = inner.optimizer.param_groups[place]["wd_mult"]
        return groups
