"""What updates a policy: the jitted update and score, the schedule, the frozen reference, built from a job."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax

from grpo_jax import hosts
from grpo_jax.models.lora import Frozen, join
from grpo_jax.models.qwen import Params
from grpo_jax.run.job import Job, grpo_objective, optimizer_of, schedule_of
from grpo_jax.update.batch import Batch, Tree
from grpo_jax.update.update import (
    ModelStep,
    TrainState,
    init_state,
    make_score,
    make_update,
    micro_batches_for,
    update_sizes,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Learner:
    """The compiled parts of an update and what they were made for.

    Args:
        schedule: updates done -> learning rate.
        score: jitted log-probabilities of a frozen or earlier policy.
        reference: parameters of the frozen reference; None when beta is 0.
        frozen: the base under trained adapters; None when all weights are trained.
        sizes: numbers of prompts that an update may shrink to.
        shapes: of the state.
        fresh: makes the state before the first update, which a run that continues does not need.
    """

    forward: ModelStep
    schedule: Callable[[int], Any]
    update: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    score: Callable[[Params, Batch], Any]
    reference: Params | None
    frozen: Frozen | None
    sizes: tuple[int, ...]
    shapes: TrainState
    fresh: Callable[[], TrainState]

    def params(self, state: TrainState) -> Params:
        """The whole model's parameters."""
        return join(state.params, self.frozen)


def make_learner(job: Job, tree: Tree, P: int, updates: int) -> Learner:
    """The learner of a job whose run makes so many updates with batches of P prompts."""
    config, G = job.config, job.config.num_generations
    schedule = schedule_of(config, updates)
    optimizer = optimizer_of(config, schedule)
    frozen = job.load_frozen()
    state_of = lambda weights: init_state(weights, optimizer, job.training)  # noqa: E731
    shapes = jax.eval_shape(state_of, job.trained_shapes(frozen))
    step = ModelStep(job.model, job.training, job.dtype, config.gradient_checkpointing, config.temperature)
    fits = lambda: micro_batches_for(step, tree, P, G)  # noqa: E731
    parts = config.micro_batches or hosts.of_first(fits)  # hosts may differ in memory
    if parts > 1:
        job.console.line(f"The update runs its {P * G} completions in {parts} micro-batches")
    step = dataclasses.replace(step, micro_batches=parts)
    objective = grpo_objective(config)
    reference = None
    if config.beta:
        reference = frozen.base if frozen else job.load_params(dtype=job.dtype)
    update = make_update(step, optimizer, objective, shapes, frozen)
    sizes = () if objective.needs_all_rows else update_sizes(step, P, G)
    log.debug("Updates of %s prompts", " or ".join(map(str, (P, *sizes))))
    return Learner(
        *(step, schedule, update, make_score(step), reference, frozen, sizes, shapes),
        fresh=lambda: state_of(job.first_weights(frozen)),
    )
