"""The update on the prefix tree against float64 numpy: log-probabilities, loss, gradient, AdamW."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.models.qwen import ModelConfig
from grpo_jax.types import Status
from grpo_jax.update import batch as batch_module
from grpo_jax.update.batch import Tree, make_tree
from grpo_jax.update.optimizer import make_optimizer, scale_by_adam
from grpo_jax.update.schedules import make_schedule
from grpo_jax.update.update import (
    GrpoObjective,
    ModelStep,
    batch_loss,
    init_state,
    make_score,
    make_update,
    sft_objective,
)

CFG = ModelConfig("qwen3", V=48, D=16, F=24, L=2, N=4, K=2, H=4, rope_theta=1e4, norm_eps=1e-6, tied=True)
TEMPERATURE, EPSILON, EPSILON_HIGH, BETA = 0.8, 0.1, 0.15, 0.3
END = 47
PROMPTS = [[1, 2, 3, 10, 11], [1, 2, 3, 12], [1, 2, 3, 13, 14, 15, 16], [1, 2, 3, 17, 18]]
P, G, BUDGET = 4, 2, 15
# one letter a token: s sampled, t of a tool response; every row ends with END
TURNS = ["sssttss", "ss", "ssssssssss", "stttts", "sss", "ssttsstts", "s", "ssts"]
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 0.7, -0.7, 1.3, -1.3]
LEAVES = {  # a weight of every kind, for finite differences
    ("embedding",): (10, 3),
    ("norm", "scale"): (5,),
    ("layers", "attention", "q"): (1, 2, 3, 1),
    ("layers", "attention", "k"): (0, 4, 1, 2),
    ("layers", "attention", "v"): (1, 5, 0, 3),
    ("layers", "attention", "o"): (0, 2, 1, 7),
    ("layers", "attention", "k_norm", "scale"): (1, 2),
    ("layers", "mlp", "gate"): (0, 3, 11),
    ("layers", "mlp", "down"): (1, 20, 4),
}


@functools.cache
def weights():
    return helpers.random_weights(CFG, seed=3)


def trajectories(prompts=PROMPTS, turns=TURNS, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for i, turn in enumerate(turns):
        ids = [*rng.integers(4, 47, len(turn) - 1).tolist(), END]
        mask = [kind == "s" for kind in turn]
        logprobs = [-float(rng.exponential()) if m else 0.0 for m in mask]
        out.append(helpers.trajectory(prompts[i // G], ids, mask, logprobs, ADVANTAGES[i]))
    return out


def with_rows(batch, **fields):
    """The batch with other fields of its completions."""
    return dataclasses.replace(batch, completions=dataclasses.replace(batch.completions, **fields))


def make_batch(rows=None, tree=None, learned=None):
    """The batch of `trajectories`, with old and reference log-probabilities near the current ones."""
    rows = rows or trajectories()
    tree = tree or make_tree([row.prompt.ids for row in rows], BUDGET)
    status = {True: Status.ANSWERED, False: Status.OVERLONG}
    learned = [True] * len(rows) if learned is None else learned
    marked = [
        dataclasses.replace(row, status=status[is_in]) for row, is_in in zip(rows, learned, strict=True)
    ]
    batch = batch_module.make_batch(tree, marked, G, mask_truncated=True)
    rng = np.random.default_rng(1)
    current = numpy_scores(weights(), rows, batch.completions.targets.shape)
    old, ref = current + rng.normal(0, 0.2, (2, *current.shape))
    return batch.with_logprobs(old_logprobs=old.astype(np.float32), ref_logprobs=ref.astype(np.float32))


@functools.cache
def base():
    return make_batch()


# --- the independent version, in float64 -------------------------------------------------------------


def numpy_table(params, ids):
    """log softmax [T, V] of a plain Qwen3 forward over one row of tokens."""
    at = lambda *path: functools.reduce(lambda tree, key: tree[key], path, params)  # noqa: E731
    norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.norm_eps) * scale  # noqa: E731
    T, half = len(ids), CFG.H // 2
    angle = np.arange(T)[:, None, None] * CFG.rope_theta ** -(np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)

    def rope(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = at("embedding")[ids]
    layers = at("layers")
    for i in range(CFG.L):
        layer = jax.tree.map(lambda w, i=i: w[i], layers)
        a, h = layer["attention"], norm(x, layer["attention_norm"]["scale"])
        q = rope(norm(np.einsum("td,dnh->tnh", h, a["q"]), a["q_norm"]["scale"]))
        k = rope(norm(np.einsum("td,dkh->tkh", h, a["k"]), a["k_norm"]["scale"]))
        v = np.einsum("td,dkh->tkh", h, a["v"])
        k, v = (np.repeat(y, CFG.N // CFG.K, axis=1) for y in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(CFG.H)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("tnh,nhd->td", np.einsum("nts,snh->tnh", p, v), a["o"])
        h, m = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate = h @ m["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"])) @ m["down"]
    logits = norm(x, at("norm", "scale")) @ at("embedding").T / TEMPERATURE
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def float64(params):
    return jax.tree.map(lambda w: np.array(w, np.float64), params)


def numpy_scores(params, rows, shape):
    """[B, T2] log-probabilities of the sampled tokens, from flat rows."""
    out, params = np.zeros(shape), float64(params)
    for i, row in enumerate(rows):
        ids = [*row.prompt.ids, *row.completion_ids]
        table, n = numpy_table(params, ids), len(row.prompt.ids)
        for t, sampled in enumerate(row.sampled_mask):
            if sampled:
                out[i, t] = table[n + t - 1, ids[n + t]]
    return out


def numpy_entropies(params, rows, shape):
    """[B, T2] entropies at the sampled tokens, from flat rows."""
    out, params = np.zeros(shape), float64(params)
    for i, row in enumerate(rows):
        table = numpy_table(params, [*row.prompt.ids, *row.completion_ids])[len(row.prompt.ids) - 1 : -1]
        out[i, : len(table)] = -(np.exp(table) * table).sum(-1) * row.sampled_mask
    return out


def numpy_loss(params, rows, batch, advantages=ADVANTAGES, learns=None):
    """Clipped surrogate + beta * ratio * k3 averaged over all sampled tokens, token by token; and metrics.

    `learns` [B, T2]: where the surrogate acts; None: everywhere.
    """
    learns = np.ones(batch.completions.trained.shape, bool) if learns is None else learns
    current = numpy_scores(params, rows, batch.completions.targets.shape)
    total, kl, low, high, tokens, gaps = 0.0, 0.0, 0, 0, 0, []
    for i, t in zip(*np.nonzero(batch.completions.trained), strict=True):
        new, A = current[i, t], advantages[i]
        ratio = np.exp(new - float(batch.completions.old_logprobs[i, t]))
        clipped = min(max(ratio, 1 - EPSILON), 1 + EPSILON_HIGH)
        difference = float(batch.completions.ref_logprobs[i, t]) - new
        k3 = ratio * (np.exp(difference) - difference - 1)
        total += -min(ratio * A, clipped * A) * learns[i, t] + BETA * k3
        kl, tokens = kl + k3, tokens + 1
        low, high = low + (A < 0 and ratio < 1 - EPSILON), high + (A > 0 and ratio > 1 + EPSILON_HIGH)
        gaps.append(abs(new - float(batch.completions.sampler_logprobs[i, t])))
    return total / tokens, {
        "kl": kl / tokens,
        "clip_ratio/low_mean": low / tokens,
        "clip_ratio/high_mean": high / tokens,
        "clip_ratio/region_mean": (low + high) / tokens,
        "sampling/sampling_logp_difference/mean": np.mean(gaps),
        "sampling/sampling_logp_difference/max": max(gaps),
    }


# --- the functions under test ------------------------------------------------------------------------


OBJECTIVE = GrpoObjective(EPSILON, EPSILON_HIGH, beta=BETA, max_completion_length=BUDGET)


def model_step(micro_batches=1):
    return ModelStep(
        CFG, helpers.layouts()[0], helpers.FLOAT32, temperature=TEMPERATURE, micro_batches=micro_batches
    )


@functools.cache
def gradient_function(micro_batches):
    step = model_step(micro_batches)
    return jax.jit(jax.value_and_grad(lambda p, batch: batch_loss(step, OBJECTIVE, p, batch), has_aux=True))


def gradient(batch, micro_batches=1, params=None):
    """(loss, metrics, gradients) of the GRPO objective."""
    params = weights() if params is None else params
    (loss, metrics), grads = gradient_function(micro_batches)(params, batch)
    report = metrics.sums | metrics.maxima
    return float(loss), {key: float(x) for key, x in report.items()}, jax.device_get(grads)


@functools.cache
def score_function(micro_batches=1):
    return make_score(model_step(micro_batches))


def score(batch, micro_batches=1, params=None):
    return np.asarray(score_function(micro_batches)(weights() if params is None else params, batch))


ADAMW = {"rule": scale_by_adam(0.9, 0.95, 1e-8), "weight_decay": 0.1, "max_grad_norm": 0.5}
RATES = (1e-2, 5e-3)  # of the first two updates


@functools.cache
def updater():
    optimizer = make_optimizer(schedule=lambda count: jnp.where(count == 0, *RATES), **ADAMW)
    state = init_state(weights(), optimizer, model_step().layout)
    return make_update(model_step(), optimizer, OBJECTIVE, state), state


def fresh_state():
    """A copy: the update takes its state's buffers."""
    return jax.tree.map(jnp.copy, updater()[1])


def update(state, batch):
    state, metrics = updater()[0](state, batch)
    return state, jax.device_get(metrics)


def same(a, b):
    """Bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


# --- against numpy -----------------------------------------------------------------------------------


def test_scores_are_those_of_a_flat_forward():
    want = numpy_scores(weights(), trajectories(), base().completions.targets.shape)
    np.testing.assert_allclose(score(base()), want, atol=2e-5)
    assert (want[base().completions.trained] < 0).all() and not want[~base().completions.trained].any()


def test_loss_and_metrics_are_those_of_numpy():
    loss, metrics, _ = gradient(base())
    want, want_metrics = numpy_loss(weights(), trajectories(), base())
    assert want_metrics["clip_ratio/low_mean"] > 0 and want_metrics["clip_ratio/high_mean"] > 0
    assert loss == pytest.approx(want, rel=1e-4)
    assert {key: metrics[key] for key in want_metrics} == pytest.approx(want_metrics, rel=1e-3)


def test_gradient_is_that_of_finite_differences():
    """Central differences of the float64 loss, one weight of every kind."""
    grads, rows, h = gradient(base())[2], trajectories(), 1e-5

    def shifted(path, index, by):
        params = float64(weights())
        functools.reduce(lambda tree, key: tree[key], path, params)[index] += by
        return numpy_loss(params, rows, base())[0]

    for path, index in LEAVES.items():
        want = (shifted(path, index, h) - shifted(path, index, -h)) / (2 * h)
        have = functools.reduce(lambda tree, key: tree[key], path, grads)[index]
        assert abs(want) > 1e-5, path  # a weight without influence would prove nothing
        assert have == pytest.approx(want, rel=2e-3, abs=1e-6), path


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_leaving_out_groups_that_have_no_advantage_changes_no_gradient(loss_type):
    """Two of four groups have equal rewards; the batch without them has the loss and gradient of all."""
    advantages = [0.0, 0.0, 0.5, -0.5, 0.0, 0.0, 1.3, -1.3]
    rows = [dataclasses.replace(t, advantage=a) for t, a in zip(trajectories(), advantages, strict=True)]
    tree = make_tree([row.prompt.ids for row in rows], BUDGET)
    objective = GrpoObjective(loss_type=loss_type, max_completion_length=BUDGET)
    few, all_rows = (batch_module.make_batch(tree, rows, G, sizes=sizes) for sizes in ((2,), ()))
    assert (len(few.prompts.tokens), len(all_rows.prompts.tokens)) == (2, 4)
    of_batch = jax.jit(jax.value_and_grad(lambda p, b: batch_loss(model_step(), objective, p, b)[0]))
    (loss, grads), (want, want_grads) = of_batch(weights(), few), of_batch(weights(), all_rows)
    assert optax.tree.norm(want_grads) > 1e-2
    assert float(loss) == pytest.approx(float(want), rel=1e-5, abs=1e-7)
    assert_close(grads, want_grads)


def test_entropy_is_that_of_the_sampled_positions():
    total = numpy_entropies(weights(), trajectories(), base().completions.targets.shape).sum()
    assert gradient(base())[1]["entropy"] == pytest.approx(total / base().completions.trained.sum(), rel=1e-4)


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_the_surrogate_acts_on_the_tokens_of_highest_entropy(micro_batches):
    """As TRL: numpy's quantile over all sampled tokens of the batch; the KL and the divisor are those of all."""
    rows, batch = trajectories(), base()
    entropies = numpy_entropies(weights(), rows, batch.completions.targets.shape)
    learns = entropies >= np.quantile(entropies[batch.completions.trained], 1 - 0.35)
    assert learns[batch.completions.trained].sum() == 11  # of 31
    objective = dataclasses.replace(OBJECTIVE, top_entropy_quantile=0.35)
    step = model_step(micro_batches)
    loss_of = jax.jit(jax.value_and_grad(lambda p, batch: batch_loss(step, objective, p, batch)[0]))
    (loss, grads), params, h = loss_of(weights(), batch), float64(weights()), 1e-5
    assert float(loss) == pytest.approx(numpy_loss(weights(), rows, batch, learns=learns)[0], rel=1e-4)
    shifted = []
    for by in (h, -h):  # the chosen tokens stay the same
        params["layers"]["mlp"]["down"][1, 20, 4] += by
        shifted.append(numpy_loss(params, rows, batch, learns=learns)[0])
        params["layers"]["mlp"]["down"][1, 20, 4] -= by
    want = (shifted[0] - shifted[1]) / (2 * h)
    assert abs(want) > 1e-5
    assert float(grads["layers"]["mlp"]["down"][1, 20, 4]) == pytest.approx(want, rel=2e-3, abs=1e-6)


def test_two_updates_are_adamw_by_hand():
    """Clip by the global norm, two moments, bias correction, decay of matrices but not of scales."""
    paths = [("layers", "mlp", "gate"), ("norm", "scale")]
    state = fresh_state()
    weight = {path: float64(weights()) for path in paths}
    weight = {path: functools.reduce(lambda t, k: t[k], path, tree) for path, tree in weight.items()}
    m, v = (dict.fromkeys(paths, 0.0) for _ in range(2))
    for count in (1, 2):
        grads = gradient(base(), params=state.params)[2]
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
        state, metrics = update(state, base())
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > ADAMW["max_grad_norm"]
        for path in paths:
            g = functools.reduce(lambda t, k: t[k], path, grads) * (ADAMW["max_grad_norm"] / norm)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.95 * v[path] + 0.05 * g**2
            step = m[path] / (1 - 0.9**count) / (np.sqrt(v[path] / (1 - 0.95**count)) + 1e-8)
            decay = 0.1 if path[-1] == "gate" else 0.0
            weight[path] = weight[path] - RATES[count - 1] * (step + decay * weight[path])
            have = functools.reduce(lambda t, k: t[k], path, state.params)
            np.testing.assert_allclose(have, weight[path], atol=3e-5)
    assert int(state.step) == 2


@pytest.mark.slow
def test_bf16_weights_move_as_float32_ones_do_on_average():
    """Adam's first step is the rate against the gradient's sign, here 3e-4.

    Weights above 1/2 have bits of 2⁻⁸ and more, so that nearest rounding would leave them all;
    of bits of up to 2⁻⁷ the moves have a variance of up to 3e-4 · 2⁻⁷ each.
    """
    rate = 3e-4
    optimizer = make_optimizer(schedule=lambda count: rate, **ADAMW | {"weight_decay": 0.0})
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights())
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    gradients = gradient(base(), params=wide)[2]
    state = init_state(narrow, optimizer, model_step().layout)
    assert {x.dtype.name for x in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    after, _ = make_update(model_step(), optimizer, OBJECTIVE, state)(state, base())
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype("bfloat16")}
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(float64(tree))])  # noqa: E731
    start, signs = flat(wide), np.sign(flat(gradients))
    moved = flat(after.params) - start
    assert 0.02 < (moved[np.abs(start) > 0.5] != 0).mean() < 0.15
    step = -(signs * moved)[signs != 0]
    assert abs(step.mean() - rate) < 5 * (rate * 2**-7 / step.size) ** 0.5 < rate / 2


# --- rule 2 ------------------------------------------------------------------------------------------


def changed(tokens, where):
    """Other tokens at the given places."""
    return np.where(where, (tokens + 5) % CFG.V, tokens).astype(np.int32)


def test_rule_2_only_sampled_tokens_learn():
    """What the model reads stays; the targets at tool responses and padding change."""
    batch = base()
    assert (batch.completions.level.valid & ~batch.completions.trained).any()  # tool tokens are among them
    others = with_rows(batch, targets=changed(batch.completions.targets, ~batch.completions.trained))
    assert same(gradient(others), gradient(batch))
    one = np.zeros_like(batch.completions.trained)
    one[0, 0] = True  # a sampled token
    sampled = with_rows(batch, targets=changed(batch.completions.targets, one))
    assert not same(gradient(sampled)[2], gradient(batch)[2])


def test_rule_2_the_sampled_end_of_turn_is_trained():
    batch = base()
    last = batch.completions.level.valid.sum(1) - 1
    rows = np.arange(len(last))
    assert (batch.completions.targets[rows, last] == END).all() and batch.completions.trained[
        rows, last
    ].all()
    assert (score(batch)[rows, last] < 0).all()
    ends = np.zeros_like(batch.completions.trained)
    ends[3, last[3]] = True
    other = with_rows(batch, targets=changed(batch.completions.targets, ends))
    assert not same(gradient(other)[2], gradient(batch)[2])


def test_rule_2_a_tool_responses_content_changes_what_follows():
    """Row 0 is sss tt ss: the first t, read at position 4, changes; sampled tokens before it keep their score."""
    batch, where = base(), np.zeros_like(base().completions.trained)
    where[0, 4] = True
    assert batch.completions.level.valid[0, 4] and not batch.completions.trained[0, 3]
    others = with_rows(
        batch,
        level=dataclasses.replace(
            batch.completions.level, tokens=changed(batch.completions.level.tokens, where)
        ),
    )
    before, after = score(batch), score(others)
    assert (before[1:] == after[1:]).all() and (before[0, :3] == after[0, :3]).all()
    assert (np.abs(before[0, 5:7] - after[0, 5:7]) > 1e-3).all()


# --- splitting, paths and guards ---------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_accumulation_does_not_change_the_result(micro_batches):
    """4: two generations of two prompts each; 8: one row at a time."""
    loss, metrics, grads = gradient(base())
    loss_m, metrics_m, grads_m = gradient(base(), micro_batches)
    assert loss_m == pytest.approx(loss, rel=1e-5)
    assert metrics_m == pytest.approx(metrics, rel=1e-4)
    assert_close(grads_m, grads)


def test_without_old_logprobs_the_current_ones_serve():
    """Also in two micro-batches, one generation of every prompt each."""
    current = with_rows(base(), old_logprobs=score(base()))
    none = with_rows(base(), old_logprobs=None)
    loss, metrics, grads = gradient(current)
    loss_n, metrics_n, grads_n = gradient(none, micro_batches=2)
    assert loss_n == pytest.approx(loss, rel=1e-5)
    assert metrics_n == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert_close(grads_n, grads)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_scores_do_not_depend_on_the_split(micro_batches):
    np.testing.assert_allclose(score(base(), micro_batches), score(base()), atol=1e-5)


def test_a_split_that_does_not_come_out_even_is_refused():
    with pytest.raises(ValueError, match="micro_batches 3 cannot split 4 prompts × 2 generations"):
        score(base(), micro_batches=3)


def test_score_gives_the_log_probabilities_of_the_update():
    """As the sampler's, old and reference ones they leave no gap, no clipping, no KL."""
    current = score(base())
    fields = dict.fromkeys(("sampler_logprobs", "old_logprobs", "ref_logprobs"), current)
    loss, metrics, _ = gradient(with_rows(base(), **fields))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["kl"] < 1e-8 and metrics["clip_ratio/region_mean"] == 0
    tokens = base().completions.trained.sum(1)
    assert loss == pytest.approx(-(np.array(ADVANTAGES) * tokens).sum() / tokens.sum(), rel=1e-5)


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_token_has_its_own_advantage(micro_batches):
    """On policy the loss is minus the mean advantage of the trained tokens, wherever these lie in their rows."""
    trained, current = base().completions.trained, score(base())
    advantages = np.random.default_rng(5).normal(size=trained.shape).astype(np.float32)
    fields = dict.fromkeys(("sampler_logprobs", "old_logprobs", "ref_logprobs"), current)
    loss, _, _ = gradient(with_rows(base(), advantages=advantages, **fields), micro_batches)
    assert loss == pytest.approx(-advantages[trained].mean(), rel=1e-5)


@pytest.mark.parametrize("level", ["preamble", "prompts"])
def test_an_empty_level_is_left_out(level):
    """T0 = 0: nothing in common; T1 = 0: prompts that differ in their last token only."""
    if level == "preamble":
        rows, tree = trajectories(), Tree((), 0, 16, BUDGET)
    else:
        rows, tree = trajectories([[1, 2, 3, i] for i in range(4, 8)]), None
    batch = make_batch(rows, tree)
    assert (batch.preamble if level == "preamble" else batch.prompts).tokens.shape[1] == 0
    np.testing.assert_allclose(score(batch), numpy_scores(weights(), rows, (8, 16)), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 8])
def test_without_a_preamble_the_gradient_is_the_same(micro_batches):
    flat = make_batch(tree=Tree((), 0, 16, BUDGET))
    assert_close(gradient(flat, micro_batches), gradient(base()))


def test_rows_that_are_not_learned_keep_their_place_and_have_no_advantage():
    learned = [True, False, True, True, False, True, True, True]
    batch = make_batch(learned=learned)
    assert batch.completions.level.valid.sum() == base().completions.level.valid.sum()
    loss, _, grads = gradient(batch)
    assert loss == pytest.approx(numpy_loss(weights(), trajectories(), batch)[0], rel=1e-4)
    advantages = np.where(learned, batch.completions.advantages, 99).astype(np.float32)
    assert same(gradient(with_rows(batch, advantages=advantages))[2], grads)


def test_a_batch_without_learned_rows_changes_nothing():
    loss, _, grads = gradient(make_batch(learned=[False] * 8))
    assert loss == 0 and not any(g.any() for g in jax.tree.leaves(grads))


def test_a_step_that_is_not_finite_is_skipped_and_reported():
    """Weights and moments stay bit for bit, the step counts, and the next update continues."""
    state, metrics = update(fresh_state(), base())
    assert not metrics["skipped"]
    before = jax.device_get(state)
    advantages = base().completions.advantages.copy()
    advantages[2] = np.nan
    state, metrics = update(state, with_rows(base(), advantages=advantages))
    assert metrics["skipped"] and np.isnan(metrics["loss"])
    assert same(state.params, before.params) and same(state.opt_state, before.opt_state)
    assert int(state.step) == 2 and int(before.step) == 1
    state, metrics = update(state, base())
    assert not metrics["skipped"] and not same(state.params, before.params)


def test_another_rate_or_schedule_is_the_same_program():
    """The rate is an argument of the update, so that a sweep compiles it once."""
    _, state = updater()
    programs = {
        make_update(model_step(), make_optimizer(schedule=schedule, **ADAMW), OBJECTIVE, state)
        .lower(state, base())
        .as_text()
        for schedule in (lambda count: 1e-3, lambda count: 2e-3, make_schedule("cosine", 1e-4, 2, 9))
    }
    assert len(programs) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_an_update_moves_a_rows_log_probability_with_its_advantage(sign):
    current = score(base())
    advantages = np.zeros(8, np.float32)
    advantages[0] = sign
    batch = with_rows(base(), advantages=advantages, old_logprobs=current, ref_logprobs=current)
    state, _ = update(fresh_state(), batch)
    moved = (score(batch, params=state.params) - current)[0].sum()
    assert sign * moved > 0.01


def test_supervised_loss_is_the_mean_negative_log_likelihood():
    loss, _ = jax.jit(lambda *args: batch_loss(model_step(), sft_objective, *args))(weights(), base())
    want = numpy_scores(weights(), trajectories(), (8, 16)).sum() / base().completions.trained.sum()
    assert float(loss) == pytest.approx(-want, rel=1e-5)
