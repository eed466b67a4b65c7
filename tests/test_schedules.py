"""Schedules next to transformers' own, at every update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.update.schedules import DECAYS, make_schedule, schedule_problem

WSD = {"num_decay_steps": 12}
CASES = [
    *((name, {}) for name in DECAYS if name not in ("cosine_with_min_lr", "warmup_stable_decay")),
    ("cosine", {"num_cycles": 0.25}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("inverse_sqrt", {"timescale": 3}),
    ("warmup_stable_decay", WSD),
    ("warmup_stable_decay", WSD | {"decay_type": "linear", "min_lr_ratio": 0.1, "warmup_type": "cosine"}),
    ("warmup_stable_decay", WSD | {"decay_type": "1-sqrt", "warmup_type": "1-sqrt", "num_stable_steps": 2}),
]


# Peak 2.0, 2 warm-up updates, 6 in all; HF's lambdas at steps 0..6, by hand.
# cosine: (1 + cos(pi * k / 4)) for k = 0..4 = 2, 1.7071068, 1, 0.2928932, 0.
# inverse_sqrt: 2 / sqrt((k + 2) / 2) for k = 0..4; warmup_stable_decay: 2 stable, 2 of linear decay to 0.2.
@pytest.mark.parametrize(
    ("name", "arguments", "rates"),
    [
        ("constant", {}, [2, 2, 2, 2, 2, 2, 2]),
        ("constant_with_warmup", {}, [0, 1, 2, 2, 2, 2, 2]),
        ("linear", {}, [0, 1, 2, 1.5, 1, 0.5, 0]),
        ("cosine", {}, [0, 1, 2, 1.7071068, 1, 0.2928932, 0]),
        ("cosine_with_min_lr", {"min_lr": 1.0}, [0, 1, 2, 1.8535534, 1.5, 1.1464466, 1]),
        ("polynomial", {"lr_end": 0.4, "power": 2}, [0, 1, 2, 1.3, 0.8, 0.5, 0.4]),
        ("inverse_sqrt", {}, [0, 1, 2, 1.6329932, 1.4142136, 1.2649111, 1.1547005]),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 2, "decay_type": "linear", "min_lr_ratio": 0.1},
            [0.2, 1.1, 2, 2, 2, 1.1, 0.2],
        ),
    ],
)
def test_schedule_has_the_values_worked_by_hand(name, arguments, rates):
    schedule = jax.jit(make_schedule(name, 2.0, 2, 6, arguments))
    got = [schedule(jnp.int32(step)) for step in range(7)]
    np.testing.assert_allclose(got, rates, rtol=1e-6, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_a_schedule_equals_transformers_at_every_update(name, arguments, warmup):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    total, peak = 40, 3e-4
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = get_scheduler(name, theirs, warmup, total, scheduler_specific_kwargs=arguments)
    want = []
    for _ in range(total):
        want.append(scheduler.get_last_lr()[0])
        theirs.step()
        scheduler.step()
    got = jax.vmap(make_schedule(name, peak, warmup, total, arguments))(jnp.arange(total))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * peak)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_without_warmup_the_first_update_has_the_peak_and_the_end_stays_zero(name):
    schedule = make_schedule(name, 3e-4, 0, 10)
    np.testing.assert_allclose(schedule(0), 3e-4, rtol=1e-6)
    np.testing.assert_allclose([schedule(10), schedule(15)], 0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("linear", {"power": 2}, "lr_scheduler_type linear takes no arguments, got 'power'"),
        ("cosine", {"num_cycle": 2}, "takes num_cycles, got 'num_cycle'; nearest: num_cycles"),
        ("cosine", {"num_cycles": "2"}, "num_cycles must be a number >= 0, got '2'"),
        ("cosine_with_min_lr", {}, "needs min_lr or min_lr_rate in lr_scheduler_kwargs, got neither"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, "got both"),
        ("polynomial", {"lr_end": 1.0}, "lr_end must be below learning_rate 1, got 1"),
        ("warmup_stable_decay", {}, "lr_scheduler_type warmup_stable_decay needs num_decay_steps"),
        (
            "warmup_stable_decay",
            WSD | {"decay_type": "exp"},
            "must be one of linear, cosine, 1-sqrt, got 'exp'",
        ),
    ],
)
def test_arguments_that_are_not_the_schedules_are_refused(name, arguments, text):
    assert text in schedule_problem(name, 1.0, arguments)


def test_a_decay_that_is_longer_than_the_run_is_refused():
    with pytest.raises(
        ValueError, match="num_decay_steps 12 and 5 updates of warm-up are more than the run's 16"
    ):
        make_schedule("warmup_stable_decay", 1.0, 5, 16, WSD)
