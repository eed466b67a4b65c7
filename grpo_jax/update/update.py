"""The one jitted update: log-probabilities on the prefix tree, an objective, AdamW.

GRPO and supervised fine-tuning differ in their objective only.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from grpo_jax.models import cost
from grpo_jax.models.level import AnyArray
from grpo_jax.models.logprobs import first_positions, token_logprobs
from grpo_jax.models.lora import Frozen, dropout_keys, fold_in, join
from grpo_jax.models.qwen import ModelConfig, Params, compiler_options, extend, head_weights
from grpo_jax.models.sharding import Layout
from grpo_jax.models.target import on_cpu
from grpo_jax.update import losses
from grpo_jax.update.batch import Batch, Completions, Tree
from grpo_jax.update.optimizer import Optimizer, in_float32, round_like


@struct.dataclass
class TrainState:
    """All that an update changes.

    Args:
        step: int32 scalar, updates done, skipped ones included.
        params: what is trained: master weights in `param_dtype`, layers stacked [L, …], or float32
            adapters on frozen weights.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """What an objective reports of a micro-batch, by metric name: shares that add up, and largest values."""

    sums: dict[str, Array]
    maxima: dict[str, Array]


class LossInputs(NamedTuple):
    """What an objective sees of a micro-batch, on loss positions; log-probabilities and entropies are in nats.

    Args:
        logprobs: differentiable.
        mask: False entries are padding.
        old_logprobs: None for the current ones.
    """

    logprobs: Float[Array, "b J"]
    entropies: Float[Array, "b J"]
    mask: Bool[Array, "b J"]
    sampler_logprobs: Float[Array, "b J"]
    old_logprobs: Float[Array, "b J"] | None
    ref_logprobs: Float[Array, "b J"] | None
    advantages: Float[AnyArray, " b"] | Float[AnyArray, "b J"]


class Totals(NamedTuple):
    """What the shares of micro-batches are divided by.

    Args:
        tokens: trained tokens of the whole batch, and `rows` its completions.
        present: trained tokens of the groups that the update was given, for means over them.
    """

    tokens: AnyArray
    rows: AnyArray
    present: AnyArray


Objective = Callable[[LossInputs, Totals], tuple[Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class ModelStep:
    """How the model is run in training.

    Args:
        dtype: that activations have.
        remat: recompute layers in the backward pass (`gradient_checkpointing`).
        temperature: the sampling distribution's; log-probabilities are taken under it.
        micro_batches: parts that the completions are run in, one after the other; the
            result does not depend on it.
    """

    cfg: ModelConfig
    layout: Layout
    dtype: Any
    remat: bool = True
    temperature: float = 1.0
    micro_batches: int = 1

    def extend(self, params, levels, segments=(), keep_kv=False):
        """`qwen.extend` with these settings."""
        return extend(
            params,
            levels,
            segments,
            cfg=self.cfg,
            dtype=self.dtype,
            remat=self.remat,
            keep_kv=keep_kv,
            constrain=self.layout.constrain,
        )


@dataclasses.dataclass(frozen=True)
class GrpoObjective:
    """A surrogate with group-relative advantages, plus β · KL to the reference, minus a bonus for entropy.

    Below 1, `top_entropy_quantile` is the share of the batch's sampled tokens that the surrogate and the bonus
    act on, those of highest entropy; the KL acts on all, and the surrogate is divided by all, as in TRL.
    `entropy_floor` is what they reach and `floor_tokens` their number; None: computed from this call's positions,
    which is the same where it sees the whole batch.

    Source: Shao et al. 2024, "DeepSeekMath", equation 3; `losses` has the formulas.
    """

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    loss_type: losses.LossType = "dapo"
    importance_sampling_level: losses.RatioLevel = "token"
    max_completion_length: int = 256
    top_entropy_quantile: float = 1.0
    use_bias_correction_kl: bool = True
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)  # A > 0, else
    vespo_positive: tuple[float, float] = (2.0, 3.0)  # k and λ
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    entropy_coef: float = 0.0
    off_policy_mask_threshold: float | None = None
    sampler_correction: Literal["none"] | losses.Correction = "none"
    sampler_correction_bounds: tuple[float | None, float | None] = (None, 3.0)
    entropy_floor: Array | None = None
    floor_tokens: Array | None = None

    @property
    def needs_all_rows(self) -> bool:
        """Whether rows of advantage 0 contribute to the loss, so that no group can be left out."""
        return bool(self.beta or self.entropy_coef) or self.top_entropy_quantile < 1

    def with_floor(self, entropies: Array, mask: Array) -> GrpoObjective:
        """The objective whose `top_entropy_quantile` is that of these positions."""
        floor = losses.entropy_floor(entropies, mask, self.top_entropy_quantile)
        tokens = (mask & (entropies >= floor)).sum()
        return dataclasses.replace(self, entropy_floor=floor, floor_tokens=tokens)

    def __call__(self, x: LossInputs, totals: Totals) -> tuple[Array, Metrics]:
        """The micro-batch's share of the loss and of each metric."""
        if self.top_entropy_quantile < 1 and self.entropy_floor is None:
            return self.with_floor(x.entropies, x.mask)(x, totals)
        old = jax.lax.stop_gradient(x.logprobs) if x.old_logprobs is None else x.old_logprobs
        log_ratio = losses.importance_ratio_log(x.logprobs, old, x.mask, self.importance_sampling_level)
        surrogate_ratio, by_token = log_ratio, x.advantages.ndim == 2
        if by_token and self.importance_sampling_level == "sequence":
            surrogate_ratio = losses.token_gradient(log_ratio, x.logprobs)
        correction = None
        if self.sampler_correction != "none":
            mode, bounds = self.sampler_correction, self.sampler_correction_bounds
            correction = losses.sampler_correction(old, x.sampler_logprobs, x.mask, mode, *bounds)
        entropies, metrics = jax.lax.stop_gradient(x.entropies), {}

        # 1. the surrogate of each position
        if self.loss_type == "cispo":
            per_token = losses.cispo(surrogate_ratio, x.logprobs, x.advantages, self.epsilon_high)
            positive = x.advantages > 0 if by_token else x.advantages[:, None] > 0
            clipped = (jnp.exp(log_ratio) > self.epsilon_high) & positive
            metrics["cispo_clip_ratio"] = (clipped & x.mask).sum() / jnp.maximum(totals.tokens, 1)
        elif self.loss_type == "sapo":
            per_token = losses.sapo(surrogate_ratio, x.advantages, *self.sapo_temperatures)
        elif self.loss_type == "vespo":
            of_tokens = losses.importance_ratio_log(x.logprobs, old, x.mask, "token")
            positive, negative = self.vespo_positive, self.vespo_negative
            per_token = losses.vespo(
                of_tokens, x.logprobs, x.mask, x.advantages, positive, negative, correction
            )
        else:
            clip = (self.epsilon, self.epsilon_high)
            per_token = losses.clipped_surrogate(surrogate_ratio, x.advantages, *clip, self.delta)
            metrics |= losses.clip_fractions(log_ratio, x.advantages, x.mask, *clip, tokens=totals.tokens)

        # 2. the positions that it acts on, and their weights
        chosen: Any
        chosen_tokens: Any
        chosen, chosen_tokens = x.mask, totals.tokens
        if self.entropy_floor is not None:
            chosen, chosen_tokens = x.mask & (entropies >= self.entropy_floor), self.floor_tokens
            per_token = jnp.where(chosen, per_token, 0)
        if self.off_policy_mask_threshold is not None:
            per_token = per_token * losses.off_policy_kept(
                x.logprobs, x.sampler_logprobs, x.mask, x.advantages, self.off_policy_mask_threshold
            )
        if correction is not None and self.loss_type != "vespo":  # there it is part of the weight
            per_token = per_token * correction

        # 3. what does not depend on the rewards
        if self.beta:
            weight = log_ratio if self.use_bias_correction_kl else None
            assert x.ref_logprobs is not None
            kl = losses.k3_kl(x.logprobs, x.ref_logprobs, weight)
            per_token = per_token + self.beta * kl
            metrics["kl"] = _mean(kl, x.mask, totals)
        loss = losses.aggregate(
            per_token,
            x.mask,
            self.loss_type,
            tokens=totals.tokens,
            rows=totals.rows,
            max_completion_length=self.max_completion_length,
        )
        if self.entropy_coef:
            bonus = jnp.where(chosen, x.entropies, 0).sum() / jnp.maximum(chosen_tokens, 1)
            loss = loss - self.entropy_coef * bonus

        metrics["entropy"] = _mean(entropies, x.mask, totals)
        gap = jnp.where(x.mask, jnp.abs(x.logprobs - x.sampler_logprobs), 0)
        metrics["sampling/sampling_logp_difference/mean"] = _mean(gap, x.mask, totals)
        return loss, Metrics(metrics, {"sampling/sampling_logp_difference/max": gap.max()})


def sft_objective(x: LossInputs, totals: Totals) -> tuple[Array, Metrics]:
    """Mean negative log-likelihood of the gold tokens, in nats."""
    entropies = jax.lax.stop_gradient(x.entropies)
    return -_mean(x.logprobs, x.mask, totals), Metrics({"entropy": _mean(entropies, x.mask, totals)}, {})


def turns_objective(x: LossInputs, totals: Totals) -> tuple[Array, Metrics]:
    """`sft_objective` with a weight for each gold token, exp(−sampler_logprobs).

    `turns_weighted` stores −log(weight) there, since gold tokens have no sampler.
    """
    return sft_objective(x._replace(logprobs=x.logprobs * jnp.exp(-x.sampler_logprobs)), totals)


def _mean(values, mask, totals):
    return jnp.where(mask, values, 0).sum() / jnp.maximum(totals.present, 1)


def make_update(
    step: ModelStep,
    optimizer: Optimizer,
    objective: Objective,
    state: TrainState,
    frozen: Frozen | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The jitted, sharded update: (state, batch) -> (state, metrics). The state is donated.

    An update whose loss or gradient is not finite changes nothing but the step count and
    reports `skipped` = 1.

    Args:
        state: or its shapes; only its shardings are taken.
        frozen: what the trained adapters sit on; None when all weights are trained.
    """

    def update(state: TrainState, batch: Batch, frozen: Frozen | None, rate: Array):
        batch = with_dropout(batch, dropout_keys(frozen, state.step, len(batch.completions.targets)))
        loss_fn = lambda trained: batch_loss(step, objective, join(trained, frozen), batch)  # noqa: E731
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grads = in_float32(grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        weights = in_float32(state.params)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, weights, learning_rate=rate, finite=finite
        )
        weights = round_like(optax.apply_updates(weights, updates), state.params, state.step, 0)
        report = metrics.sums | metrics.maxima | {"loss": loss, "grad_norm": norm, "skipped": ~finite}
        return TrainState(state.step + 1, weights, opt_state), report

    shardings = state_shardings(step.layout, state)
    jitted = jax.jit(
        update,
        in_shardings=(shardings, None, None, None),
        out_shardings=(shardings, step.layout.replicated),
        donate_argnums=0,
        compiler_options=_compiler_options(step),
    )
    rate = jax.jit(lambda updates: jnp.asarray(optimizer.schedule(updates), jnp.float32))
    # The frozen weights are an argument, since a constant would be copied, and the rate is one, so that another
    # rate or schedule is the same program.
    run = lambda state, batch: jitted(state, batch, frozen, rate(state.step))  # noqa: E731
    run.lower = lambda state, batch: jitted.lower(state, batch, frozen, jax.ShapeDtypeStruct((), jnp.float32))
    return run


def make_score(step: ModelStep) -> Callable[[Params, Batch], Float[Array, "B T2"]]:
    """Jitted log-probabilities [B, T2] of the trained tokens, 0 elsewhere (reference and old policy)."""

    def score(params: Params, batch: Batch) -> Array:
        index, mask = first_positions(batch.completions.trained, batch.J)
        logprobs: Any = _over_micro_batches(step, params, batch, lambda x, _: x.logprobs, stack=True)
        rows = jnp.arange(index.shape[0])[:, None]
        return jnp.zeros(batch.completions.targets.shape).at[rows, index].add(jnp.where(mask, logprobs, 0))

    return jax.jit(score, compiler_options=_compiler_options(step))


def _compiler_options(step: ModelStep) -> dict[str, bool | int | str]:
    """XLA's options; on a CPU LLVM's first level makes code as fast as its third in three quarters of the time."""
    options = compiler_options(step.cfg.L)
    return options | {"xla_backend_optimization_level": 1} if on_cpu() else options


def batch_loss(step: ModelStep, objective: Objective, params: Params, batch: Batch) -> tuple[Array, Metrics]:
    """The loss of a whole batch, differentiable in params, and its metrics."""
    chooses = isinstance(objective, GrpoObjective) and objective.top_entropy_quantile < 1
    if chooses and step.micro_batches > 1:  # the quantile is over all of them: one more forward pass
        seen: Any = _over_micro_batches(
            step, jax.lax.stop_gradient(params), batch, lambda x, _: (x.entropies, x.mask), stack=True
        )
        objective = objective.with_floor(*seen)
    return _over_micro_batches(step, params, batch, objective, stack=False)


# --- micro-batches: the same result, with the activations of one part of the completions at a time ---


def _over_micro_batches(step, params, batch: Batch, function, stack: bool):
    """Run `function(LossInputs, Totals)` over the micro-batches; combine its (loss, Metrics), or stack rows again.

    With one micro-batch all three levels go through the model layer by layer together. With several, the
    trunk's keys and values are computed once, kept in fp32, and differentiation pulls their summed
    cotangent back once.
    """
    P, B = len(batch.prompts.tokens), len(batch.completions.targets)
    totals = Totals(batch.tokens, batch.rows, batch.completions.trained.sum())
    trunk = batch.trunk
    if step.micro_batches == 1:
        hidden, _ = step.extend(params, (*trunk, batch.completions.level))
        return function(_loss_inputs(step, params, hidden[-1], batch.completions, batch.J), totals)
    split = Split.of(P, B // P, step.micro_batches)
    kvs = step.extend(params, trunk, keep_kv=True)[1] if trunk else ()
    kvs = jax.tree.map(lambda x: x.astype(jnp.float32), kvs)

    @jax.checkpoint
    def one(params, kvs, completions, part):
        segments = []
        for level, kv in zip(trunk, kvs, strict=True):
            valid = level.valid
            if level is batch.prompts:  # the preamble's one row serves everyone
                kv, valid = split.prompts_of(part, kv, axis=1), split.prompts_of(part, valid, axis=0)
            segments.append((jax.tree.map(lambda x: x.astype(step.dtype), kv), valid))
        hidden, _ = step.extend(params, (completions.level,), tuple(segments))
        return function(_loss_inputs(step, params, hidden[-1], completions, batch.J), totals)

    completions = jax.tree.map(split.apart, batch.completions)
    parts = jnp.arange(step.micro_batches) // split.generations

    def scan_step(carry, x):
        out = one(params, kvs, *x)
        if stack:
            return None, out
        (loss, metrics), (more_loss, more) = carry, out
        sums = jax.tree.map(jnp.add, metrics.sums, more.sums)
        maxima = jax.tree.map(jnp.maximum, metrics.maxima, more.maxima)
        return (loss + more_loss, Metrics(sums, maxima)), None

    if stack:
        stacked = jax.lax.scan(scan_step, None, (completions, parts))[1]
        return jax.tree.map(split.together, stacked)
    first = jax.tree.map(lambda x: x[0], completions)
    zero = jax.eval_shape(lambda: one(params, kvs, first, parts[0]))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)
    return jax.lax.scan(scan_step, zero, (completions, parts))[0]


class Split(NamedTuple):
    """Micro-batches: `prompts` groups of prompts × `generations` groups of generations."""

    prompts: int
    generations: int
    P: int
    G: int

    @classmethod
    def of(cls, P: int, G: int, micro_batches: int) -> Split:
        """Split generations first: every micro-batch then uses every prompt's keys and values."""
        generations = math.gcd(micro_batches, G)
        prompts = micro_batches // generations
        if P % prompts:
            raise ValueError(
                f"micro_batches {micro_batches} cannot split {P} prompts × {G} generations evenly; choose a divisor of {P * G}"
            )
        return cls(prompts, generations, P, G)

    def apart(self, x):
        """[B, …] -> [M, B/M, …]."""
        shape = (self.prompts, self.P // self.prompts, self.generations, self.G // self.generations)
        x = x.reshape(*shape, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(self.prompts * self.generations, -1, *x.shape[4:])

    def together(self, x):
        """The inverse of `apart`."""
        shape = (self.prompts, self.generations, self.P // self.prompts, self.G // self.generations)
        return x.reshape(*shape, *x.shape[2:]).swapaxes(1, 2).reshape(self.P * self.G, *x.shape[2:])

    def prompts_of(self, part, tree, axis: int):
        """The prompts of a group of prompts, out of all prompts along an axis."""
        if self.prompts == 1:
            return tree
        size = self.P // self.prompts
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, part * size, size, axis), tree)


def with_dropout(batch: Batch, keys: Array | None) -> Batch:
    """The batch with dropout keys for all rows; a shared row takes that of the first completion below it."""
    if keys is None:
        return batch

    def with_keys(level, number):
        own = keys[:: len(keys) // len(level.tokens)]
        return dataclasses.replace(level, dropout_keys=fold_in(own, number))

    completions = dataclasses.replace(batch.completions, level=with_keys(batch.completions.level, 2))
    return dataclasses.replace(
        batch,
        preamble=with_keys(batch.preamble, 0),
        prompts=with_keys(batch.prompts, 1),
        completions=completions,
    )


def _loss_inputs(step: ModelStep, params: Params, hidden, completions: Completions, J: int) -> LossInputs:
    """Gather each row's loss positions and take their log-probabilities."""
    index, mask = first_positions(completions.trained, J)
    hidden = jnp.take_along_axis(hidden, index[..., None], 1)

    def at(x: Any) -> Any:
        return None if x is None else jnp.take_along_axis(x, index, 1)

    logprobs, entropies = token_logprobs(
        hidden,
        head_weights(params),
        at(completions.targets),
        step.temperature,
        shards=step.layout.head_shards(step.cfg.V),
        constrain=step.layout.constrain,
    )
    advantages = completions.advantages
    return LossInputs(
        logprobs=logprobs,
        entropies=entropies,
        mask=mask,
        sampler_logprobs=at(completions.sampler_logprobs),
        old_logprobs=at(completions.old_logprobs),
        ref_logprobs=at(completions.ref_logprobs),
        advantages=advantages if advantages.ndim == 1 else at(advantages),
    )


# --- placement on the devices, and the number of micro-batches ---


def init_state(params: Params, optimizer: Optimizer, layout: Layout) -> TrainState:
    """The state before the first update; moments are sharded like their weights."""
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    return jax.device_put(state, state_shardings(layout, state))


def state_shardings(layout: Layout, state: TrainState) -> TrainState:
    """NamedShardings of a TrainState: moments are sharded like their weights."""
    return layout.params(state)


def place_batch(layout: Layout, batch: Batch) -> Batch:
    """A host batch, the same in every process, on the devices."""
    return jax.tree.map(layout.put, batch, batch_shardings(layout, batch))


def batch_shardings(layout: Layout, batch: Batch) -> Batch:
    """NamedShardings of a Batch: completions are sharded over rows, all else is replicated."""
    everywhere = jax.tree.map(lambda _: layout.replicated, batch)
    return dataclasses.replace(everywhere, completions=jax.tree.map(layout.rows, batch.completions))


def update_sizes(step: ModelStep, P: int, G: int) -> tuple[int, ...]:
    """Numbers of prompts that an update of P × G rows may shrink to: a half and a quarter.

    Only those whose rows fill the devices and split into the micro-batches. Each needs one more program.
    """
    devices = step.layout.row_devices
    prompts = step.micro_batches // math.gcd(step.micro_batches, G)
    return tuple(P // n for n in (2, 4) if P % (n * prompts) == 0 and P // n * G % devices == 0)


def micro_batches_for(step: ModelStep, tree: Tree, P: int, G: int) -> int:
    """The fewest micro-batches whose completions' activations fit in a third of the memory.

    An estimate, see `cost.micro_batches`. One micro-batch is best where it fits: the trunk
    is then never kept.
    """
    tokens = tree.budget / step.layout.row_devices
    itemsize = jnp.dtype(step.dtype).itemsize
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return cost.micro_batches(step.cfg, P, G, tokens, itemsize, step.remat, memory)
