"""The Flax port as properties: the prefix tree, causality, positions, names, configs.

Numbers of the published models: `test_qwen_golden.py` and `test_qwen_torch.py`.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_weights
from parity import QWEN2, QWEN3

from grpo_jax.models import qwen
from grpo_jax.models.qwen import (
    Level,
    ModelConfig,
    abstract_params,
    biased_heads,
    check_params,
    compiler_options,
    extend,
    head_weights,
    in_token_blocks,
    init_params,
    rms_norm,
    rope_tables,
    rotate,
)
from grpo_jax.models.rope import Yarn
from grpo_jax.update.batch import pad_rows

SHRUNK = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40}
MODELS = {
    "qwen2": ModelConfig.from_hf(QWEN2 | SHRUNK),
    "qwen3": ModelConfig.from_hf(QWEN3 | SHRUNK | {"tie_word_embeddings": True}),
}
COMPLETIONS = 9, 4, 7, 1, 6, 9  # real tokens of six rows
# real tokens of the preamble and of the two prompts; a level without tokens is left out
TREES = {"three levels": (11, (5, 3)), "no preamble": (0, (5, 3)), "no prompts": (11, (0, 0))}
PADDING = 3  # slots that no row of a level uses
LONGEST = 32  # more positions than any row has


@functools.cache
def weights(model="qwen3"):
    return random_weights(MODELS[model], seed=0)


def as_list(params):
    """The rollout's form: layers one by one."""
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(2)]
    return params | {"layers": layers}


def level(rows, starts, shared=False, width=None):
    """Ragged rows, padded, with positions from each row's start on."""
    tokens, valid = pad_rows(rows, width or max(map(len, rows)) + PADDING)
    positions = np.asarray(starts, np.int32)[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
    return Level(*map(jnp.asarray, (tokens, positions, valid)), shared=shared)


def random_tree(tree):
    """(the tree's levels, its rows written out as one level, the cotangent of each completion token).

    The last is [B, LONGEST, D]: a random cotangent where a completion has a real token, else 0.
    """
    T0, T1 = TREES[tree]
    rng = np.random.default_rng(1)
    preamble, *rest = [rng.integers(0, 50, n).tolist() for n in (T0, *T1, *COMPLETIONS)]
    prompts, completions = rest[:2], rest[2:]
    above = [preamble + prompts[b // 3] for b in range(6)]
    starts = [len(ids) for ids in above]
    levels = [level([preamble], [0], shared=True)] if T0 else []
    levels += [level(prompts, [T0, T0], shared=True)] if any(T1) else []
    flat = [ids + completion for ids, completion in zip(above, completions, strict=True)]
    teaches = rng.normal(size=(6, LONGEST, 24))
    for b in range(6):
        teaches[b, : starts[b]] = teaches[b, len(flat[b]) :] = 0
    return (
        (*levels, level(completions, starts)),
        (level(flat, [0] * 6, width=LONGEST),),
        jnp.asarray(teaches, jnp.float32),
    )


@functools.partial(jax.jit, static_argnames=("model", "remat"))
def gradient_and_hidden(params, levels, teaches, model="qwen3", remat=False):
    """The gradient of Σ hidden · teaches[row, position] over the last level; hidden states of all."""

    def score(params):
        hidden, _ = extend(params, levels, cfg=MODELS[model], remat=remat, keep_kv=False)
        rows = jnp.arange(6)[:, None]
        return (hidden[-1] * teaches[rows, levels[-1].positions]).sum(), hidden

    return jax.grad(score, has_aux=True)(params)


def written_out(hidden, levels):
    """Every row's real hidden states from all levels, by position: [6, LONGEST, D]."""
    out = np.zeros((6, LONGEST, 24), np.float32)
    for states, lv in zip(hidden, levels, strict=True):
        for b in range(6):
            row = b * len(states) // 6
            real = np.asarray(lv.valid[row])
            out[b, np.asarray(lv.positions[row])[real]] = np.asarray(states[row])[real]
    return out


def assert_close(got, want, rtol=1e-5):
    """Equal within rtol of the largest entry, or of one."""
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * max(1, np.abs(want).max()))


@pytest.mark.parametrize(("tree", "model"), [("three levels", "qwen2"), *((tree, "qwen3") for tree in TREES)])
def test_rule_4_tree_equals_flat(tree, model):
    """Values at every position and gradients of every weight, on ragged rows with padding."""
    levels, flat, teaches = random_tree(tree)
    gradient, hidden = gradient_and_hidden(weights(model), levels, teaches, model)
    want_gradient, want = gradient_and_hidden(weights(model), flat, teaches, model)
    assert_close(written_out(hidden, levels), written_out(want, flat))
    assert all(g.any() for name, g in leaves(want_gradient) if name != "['head']")
    jax.tree.map(assert_close, gradient, want_gradient)


def leaves(params):
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]


@pytest.mark.parametrize("variant", ["remat", "list of layers", "last apart", "last apart, remat"])
def test_recomputed_and_unrolled_layers_change_nothing(variant, monkeypatch):
    levels, _, teaches = random_tree("three levels")
    want_gradient, want = gradient_and_hidden(weights(), levels, teaches)
    params = as_list(weights()) if variant == "list of layers" else weights()
    monkeypatch.setattr(qwen, "_last_unrolled", lambda levels, L: "last apart" in variant)
    again = jax.jit(gradient_and_hidden.__wrapped__, static_argnames="remat")
    gradient, hidden = again(params, levels, teaches, remat="remat" in variant)
    jax.tree.map(assert_close, hidden, want)
    want_gradient = as_list(want_gradient) if variant == "list of layers" else want_gradient
    jax.tree.map(assert_close, gradient, want_gradient)


def test_the_last_layer_is_apart_where_shared_tokens_are_most_of_a_shallow_model():
    def levels(shared, rows):
        return level([[1] * shared], [0], shared=True, width=shared), level([[1] * rows], [0], width=rows)

    assert qwen._last_unrolled(levels(33, 32), 8) and qwen._last_unrolled(levels(33, 32)[:1], 1)
    assert not qwen._last_unrolled(levels(32, 32), 8)
    assert not qwen._last_unrolled(levels(33, 32), 9)


def test_keys_and_values_of_a_last_layer_apart_join_the_others(monkeypatch):
    levels, _, _ = random_tree("three levels")
    want = run(weights(), levels)
    monkeypatch.setattr(qwen, "_last_unrolled", lambda levels, L: True)
    jax.tree.map(assert_close, jax.jit(run.__wrapped__)(weights(), levels), want)


def test_an_mlp_in_token_blocks_is_the_same_function():
    """3 blocks of 32 × 144 tokens: values and both gradients; the hidden values of one block only."""
    rng = np.random.default_rng(0)
    x, w, down, dy = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 144, 8), (8, 160), (160, 8), (32, 144, 8))
    )

    def mlp(w, down, x):
        return jax.nn.silu(x @ w) @ down

    def in_blocks(w, down, x):
        return in_token_blocks(functools.partial(mlp, w, down), x)

    got, pull = jax.vjp(in_blocks, w, down, x)
    want, pull_whole = jax.vjp(mlp, w, down, x)
    jax.tree.map(assert_close, (got, *pull(dy)), (want, *pull_whole(dy)))
    program = str(jax.make_jaxpr(lambda *args: jax.vjp(in_blocks, *args[:3])[1](args[3]))(w, down, x, dy))
    assert "f32[1,1536,160]" in program and "4608,160]" not in program and "3,1,1536,160]" not in program


def test_tokens_that_do_not_divide_into_blocks_stay_together():
    x = jnp.ones((1, 2053, 4))  # a prime number of tokens
    assert "scan" not in str(jax.make_jaxpr(lambda x: in_token_blocks(jnp.sin, x))(x))


@functools.partial(jax.jit, static_argnames=("dtype", "keep_kv"))
def run(params, levels, segments=(), dtype=jnp.float32, keep_kv=True):
    return extend(params, levels, segments, cfg=MODELS["qwen3"], dtype=dtype, keep_kv=keep_kv)


@pytest.mark.parametrize("form", ["stacked", "list of layers"])
def test_levels_in_several_calls_equal_one_call(form):
    """Prefill the preamble, then the prompts, then the completions, on the segments returned before."""
    params = weights() if form == "stacked" else as_list(weights())
    levels, _, _ = random_tree("three levels")
    want, want_kvs = run(params, levels)
    segments = ()
    for lv, hidden, kv in zip(levels, want, want_kvs, strict=True):
        (got,), (new,) = run(params, (lv,), segments)
        assert_close(got, hidden)
        jax.tree.map(assert_close, new, kv)
        segments += ((new, lv.valid),)


def test_keys_and_values_are_returned_only_when_asked_for():
    levels, _, _ = random_tree("three levels")
    _, kvs = run(weights(), levels)
    assert [kv.k.shape for kv in kvs] == [(2, 1, 2, 14, 16), (2, 2, 2, 8, 16), (2, 6, 2, 12, 16)]
    assert run(weights(), levels, keep_kv=False)[1] == ()


def plain(tokens, positions=None, valid=None):
    """One level, positions 0, 1, 2, …, all valid."""
    tokens = jnp.asarray(tokens)
    counted = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    positions = counted if positions is None else positions
    return Level(tokens, positions, jnp.ones(tokens.shape, bool) if valid is None else valid)


def hidden_of(lv):
    return run(weights(), (lv,), keep_kv=False)[0][0]


TOKENS = np.random.default_rng(2).integers(0, 50, (2, 12))


def test_causality():
    """Token 7 changes; what lies before does not, and everything from it on does."""
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = hidden_of(plain(TOKENS)), hidden_of(plain(changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert jnp.abs(before - after)[:, 7:].max(-1).min() > 1e-3


def test_rows_do_not_see_each_other():
    changed = TOKENS.copy()
    changed[1] = 0
    np.testing.assert_array_equal(hidden_of(plain(TOKENS))[0], hidden_of(plain(changed))[0])


def test_only_distances_between_positions_matter():
    """Rotary embedding: all positions + 1000 changes nothing but rounding, a gap in them does."""
    counted = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    base = hidden_of(plain(TOKENS))
    np.testing.assert_allclose(hidden_of(plain(TOKENS, counted + 1000)), base, atol=1e-3)
    gap = hidden_of(plain(TOKENS, jnp.where(counted < 6, counted, counted + 3)))
    np.testing.assert_array_equal(gap[:, :6], base[:, :6])
    assert jnp.abs(gap - base)[:, 6:].max(-1).min() > 1e-2


def test_invalid_tokens_change_no_other():
    """Neither their ids nor their positions; a valid token in the same place does."""
    hole = jnp.ones((2, 12), bool).at[:, 4].set(False)
    counted = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    other = np.where(hole, TOKENS, (TOKENS + 1) % 50)
    others = np.delete(np.arange(12), 4)
    base = hidden_of(plain(TOKENS, counted, hole))[:, others]
    moved = hidden_of(plain(other, counted.at[:, 4].set(99), hole))[:, others]
    np.testing.assert_array_equal(base, moved)
    assert jnp.abs(hidden_of(plain(TOKENS))[:, others] - base)[:, 4:].max(-1).min() > 1e-3


def test_activations_have_the_asked_dtype():
    (hidden,), (kv,) = run(weights(), (plain(TOKENS),), dtype=jnp.bfloat16)
    assert {hidden.dtype, kv.k.dtype, kv.v.dtype} == {jnp.dtype(jnp.bfloat16)}
    exact = hidden_of(plain(TOKENS))
    assert jnp.abs(hidden.astype(jnp.float32) - exact).mean() < 0.02 * jnp.abs(exact).mean()


def test_compiled_programs_keep_every_rounding_to_bf16():
    """Here that of the residual sum before a norm: run one by one, the operations cannot leave it out."""
    rng = np.random.default_rng(3)
    x, y = (jnp.asarray(rng.normal(1, 0.3, (50, 64)), jnp.bfloat16) for _ in range(2))

    def norm_of_sum(x, y):
        return rms_norm(x + y, y[0], 1e-6)

    want = norm_of_sum(x, y)
    np.testing.assert_array_equal(jax.jit(norm_of_sum, compiler_options=compiler_options(2))(x, y), want)
    assert (jax.jit(norm_of_sum)(x, y) != want).mean() > 0.1  # XLA's default


def test_a_biased_projection_rounds_once_and_has_the_gradients_of_its_formula():
    """Rounded before the bias is added as well, some of the sums differ by a bit."""
    rng = np.random.default_rng(4)
    x, w, bias, dy = (rng.normal(size=s) for s in ((2, 3, 8), (8, 4, 16), (4, 16), (2, 3, 4, 16)))
    x, w, bias, dy = (jnp.asarray(a, jnp.bfloat16) for a in (x, w, bias, dy))
    X, W, B, DY = (np.asarray(a, np.float64) for a in (x, w, bias, dy))
    product = np.einsum("btd,dnh->btnh", X, W)
    got, pull = jax.vjp(biased_heads, x, w, bias)
    np.testing.assert_array_equal(got, (product + B).astype(np.float32).astype(jnp.bfloat16))
    assert (got != product.astype(np.float32).astype(jnp.bfloat16) + bias[None, None]).any()
    gradients = np.einsum("btnh,dnh->btd", DY, W), np.einsum("btd,btnh->dnh", X, DY), DY.sum((0, 1))
    for mine, want in zip(pull(dy), gradients, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype(jnp.float32), want, rtol=2**-8, atol=2**-8)


def test_rope_angle_is_fp32_at_position_5801():
    """bf16 would turn 5801 into 5792, nine radians off; the first frequency is 1."""
    cfg = MODELS["qwen3"]
    cos, sin = rope_tables(cfg, jnp.asarray([[5801]]))
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (1, 1, 1, 8)
    angles = [5801 * 1e6 ** (-i / 8) for i in range(8)]
    # an angle's fp32 rounding is 5801 · 2⁻²⁴ = 3.5e-4
    np.testing.assert_allclose(cos.ravel(), [math.cos(a) for a in angles], atol=1e-3)
    np.testing.assert_allclose(sin.ravel(), [math.sin(a) for a in angles], atol=1e-3)
    np.testing.assert_allclose(cos[0, 0, 0, 0], math.cos(5801), atol=1e-6)


def test_yarn_stretches_the_angles_and_scales_both_tables():
    """A quarter of 5801 in the slow half of the frequencies, once the fast ones are kept."""
    yarn = Yarn(factor=4.0, original=32768, attention_factor=1.25)
    cos, sin = rope_tables(dataclasses.replace(MODELS["qwen3"], rope=yarn), jnp.asarray([[5801]]))
    angles = [5801, 5801 * 1e6 ** (-1 / 8), *(5801 / 4 * 1e6 ** (-i / 8) for i in range(5, 8))]
    places = [0, 1, 5, 6, 7]
    np.testing.assert_allclose(np.ravel(cos)[places], [1.25 * math.cos(a) for a in angles], atol=1e-3)
    np.testing.assert_allclose(np.ravel(sin)[places], [1.25 * math.sin(a) for a in angles], atol=1e-3)


def test_rotate_by_hand():
    """A quarter turn takes (x1, x2) to (−x2, x1), x1 and x2 being the halves, not neighbours."""
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    quarter = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2))
    assert rotate(x, quarter).ravel().tolist() == [-3, -4, 1, 2]
    assert rotate(x, quarter[::-1]).ravel().tolist() == [1, 2, 3, 4]


def test_rms_norm_by_hand():
    """rms of (3, 4) is 5/√2; eps counts inside the root: √(0 + 4) = 2."""
    got = rms_norm(jnp.asarray([3.0, 4.0]), jnp.asarray([1.0, 10.0]), 0.0)
    np.testing.assert_allclose(got, [0.8485281, 11.313708], rtol=1e-6)
    np.testing.assert_allclose(rms_norm(jnp.asarray([2.0, -2.0]), jnp.ones(2), 12.0), [0.5, -0.5])


def test_rms_norm_rounds_before_the_scale():
    """In bf16 the published models round the normalised values, then the product; once is not the same."""
    rng = np.random.default_rng(0)
    x, scale = (jnp.asarray(rng.normal(1, 0.3, 64), jnp.bfloat16) for _ in range(2))
    x32, scale32 = (np.asarray(a, np.float32) for a in (x, scale))
    normal = x32 / np.sqrt((x32**2).mean() + 1e-6)
    twice = (normal.astype(jnp.bfloat16).astype(np.float32) * scale32).astype(jnp.bfloat16)
    once = (normal * scale32).astype(jnp.bfloat16)
    assert (twice != once).sum() > 5
    got = rms_norm(x, scale, 1e-6)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, twice)


def test_fresh_parameters():
    """Unit norms, zero biases, kernels of standard deviation fan-in^-1/2, other values for other seeds."""
    cfg = MODELS["qwen2"]
    params = init_params(cfg, seed=3)
    check_params(cfg, params)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    attention = params["layers"]["attention"]
    assert (params["norm"]["scale"] == 1).all() and not attention["q_bias"].any()
    np.testing.assert_allclose(params["embedding"].std() * 24**0.5, 1, rtol=0.1)
    np.testing.assert_allclose(params["layers"]["mlp"]["down"].std() * 40**0.5, 1, rtol=0.1)
    np.testing.assert_allclose(attention["o"].std() * 24**0.5, 1, rtol=0.1)
    assert (attention["q"][0] != attention["q"][1]).all()  # layers differ
    again, other = init_params(cfg, seed=3), init_params(cfg, seed=4)
    np.testing.assert_array_equal(again["embedding"], params["embedding"])
    assert (other["embedding"] != params["embedding"]).all()


def test_head_is_the_embedding_table_when_tied():
    assert head_weights(weights("qwen3")) is weights("qwen3")["embedding"]
    assert head_weights(weights("qwen2")) is weights("qwen2")["head"]


def changed(params, path, value):
    """A copy with one leaf replaced, or dropped when the value is None."""
    name, *rest = path
    inner = changed(params[name], rest, value) if rest else value
    return {k: v for k, v in {**params, name: inner}.items() if v is not None}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layers", "attention", "q"), None, "parameter ['layers']['attention']['q'] is missing"),
        (("layers", "mlp", "extra"), np.ones(2), "parameter ['layers']['mlp']['extra'] is unknown"),
        (
            ("norm", "scale"),
            np.ones(23),
            "parameter ['norm']['scale'] must have shape (24,), got (23,)",
        ),
    ],
)
def test_check_params_names_the_leaf(path, value, message):
    cfg = MODELS["qwen2"]
    check_params(cfg, abstract_params(cfg))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_params(cfg, changed(abstract_params(cfg), path, value))


def test_a_renamed_weight_is_refused_where_a_layer_is_made():
    """NNX binds by position: gate, called zate, would silently serve as up, and up as gate."""
    mlp = weights()["layers"]["mlp"]
    params = changed(weights(), ("layers", "mlp", "gate"), None)
    params = changed(params, ("layers", "mlp", "zate"), mlp["gate"])
    with pytest.raises(ValueError, match="layer parameters must have the structure"):
        extend(params, (plain(TOKENS),), cfg=MODELS["qwen3"])


def test_config_by_hand():
    """As Qwen2.5-0.5B-Instruct is published."""
    published = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    want = ModelConfig("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e6, 1e-6, True)
    assert ModelConfig.from_hf(published) == want
    assert want.qkv_bias and not want.qk_norm
    shapes = [x.shape for _, x in leaves(abstract_params(want))]
    assert sum(map(math.prod, shapes)) == 494_032_768  # the published model's parameter count


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"head_dim": None}, "H", 8),  # hidden_size / num_attention_heads
        ({"num_key_value_heads": None}, "K", 4),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta",
            5e5,
        ),
        ({"rope_scaling": None}, "rope_theta", 1e6),
        ({"tie_word_embeddings": None}, "tied", False),
        ({"hidden_act": None}, "D", 32),
    ],
)
def test_config_keys_that_may_be_absent(change, field, value):
    assert getattr(ModelConfig.from_hf(edited(change)), field) == value


def edited(change):
    return {k: v for k, v in (QWEN3 | change).items() if v is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gemma"},
            r"x.json: model_type must be one of \['llama', 'qwen2', 'qwen3'\], got 'gemma'",
        ),
        ({"mlp_bias": True}, "mlp_bias must be false, got True"),
        ({"model_type": None}, "got None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "x.json: rope_scaling: the rope type must be"),
        ({"rope_scaling": {"type": "yarn"}}, "the key 'factor' is missing"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window must be false"),
        ({"hidden_size": None}, "the key 'hidden_size' is missing"),
        ({"rms_norm_eps": None}, "the key 'rms_norm_eps' is missing"),
        ({"rope_theta": None}, "the key 'rope_theta' is missing"),
    ],
)
def test_unsupported_configs_are_errors_that_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(edited(change), "x.json")
