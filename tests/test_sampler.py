"""What a token is drawn from, how a decode ends, and what it leaves in the cache."""

import functools
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from grpo_jax.models.qwen import Level, ModelConfig, extend, head_weights
from grpo_jax.models.sharding import Layout
from grpo_jax.models.target import compiling_for
from grpo_jax.rollout.loop import make_policy
from grpo_jax.rollout.sampler import cache_sizes, compaction_pays, make_sampler, part_sizes
from grpo_jax.rollout.sampling import Sampling, _chosen, _in_blocks, _kept, _of_blocks, row_keys, sample
from grpo_jax.update.batch import pad_rows, prompts_level

BUDGET = helpers.BUDGET
END = helpers.conversation().stop_ids[0]
DRAWS = 20_000
LOGITS = np.log([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.02])
METHODS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(top_k=3),
    Sampling(top_p=0.7),
    Sampling(min_p=0.25),
    Sampling(temperature=1.5, top_k=6, top_p=0.8, min_p=0.3),
]


def numpy_distribution(logits, sampling):
    """Temperature, then top-k, top-p of what is left, min-p: loops over sorted tokens."""
    scaled = logits / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    keep = order[: sampling.top_k] if sampling.top_k else order
    mass, nucleus = 0.0, []
    for i in keep:
        if mass < sampling.top_p * sum(p[j] for j in keep):
            nucleus.append(i)
        mass += p[i]
    keep = [i for i in nucleus if p[i] >= sampling.min_p * p.max()]
    out = np.zeros_like(p)
    out[keep] = p[keep]
    return out / out.sum(), p


def keys(n, seed=0):
    return row_keys(seed, np.arange(n), np.zeros(n, np.int32))


@pytest.mark.parametrize("sampling", METHODS, ids=str)
def test_draws_follow_the_truncated_distribution(sampling):
    """Chi-square over many rows; and no token outside of the kept set, ever."""
    order = np.random.default_rng(0).permutation(len(LOGITS))  # not sorted by mass
    logits = LOGITS[order]
    want, full = numpy_distribution(logits, sampling)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (DRAWS, 1))
    tokens, logprobs = sample(rows, keys(DRAWS), jnp.zeros(DRAWS, jnp.int32), sampling.drawing)
    counts = np.bincount(tokens, minlength=len(logits))
    assert (counts[want == 0] == 0).all()
    expected = DRAWS * want[want > 0]
    chi_square = ((counts[want > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 1
    np.testing.assert_allclose(logprobs, np.log(full)[tokens], atol=1e-5)  # of the full distribution


def test_every_position_of_a_row_draws_anew():
    """One row's key at 20,000 positions: the draws are as independent as those of 20,000 rows."""
    rows = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (DRAWS, 1))
    tokens, _ = sample(rows, jnp.tile(keys(1), (DRAWS, 1)), jnp.arange(DRAWS), Sampling().drawing)
    np.testing.assert_allclose(np.bincount(tokens) / DRAWS, np.exp(LOGITS), atol=0.015)


def test_temperature_zero_takes_the_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    tokens, logprobs = sample(logits, keys(2), jnp.zeros(2, jnp.int32), Sampling(temperature=0).drawing)
    assert tokens.tolist() == [1, 0]
    want = [3 - np.log(np.exp([0, 3, 1]).sum()), 2 - np.log(np.exp([2, -1, 1.9]).sum())]
    np.testing.assert_allclose(logprobs, want, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=12, max_size=12, unique=True),
    st.integers(0, 14),
    st.sampled_from([1.0, 0.95, 0.5, 0.1]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_the_kept_set_is_an_independent_ones(logits, top_k, top_p, min_p):
    logits = np.array(logits) / 7  # all different: which of two equals goes is not fixed
    sampling = Sampling(1.0, top_k, top_p, min_p)
    mass = jnp.asarray(np.exp(logits - logits.max()), jnp.float32)[None]
    kept = np.asarray(_kept(mass, sampling.drawing)[0])
    assert kept.tolist() == (numpy_distribution(logits, sampling)[0] > 0).tolist()


def test_the_nucleus_ends_where_its_mass_reaches_top_p():
    mass = jnp.asarray([[0.25, 1.0, 0.5, 0.25]])  # shares 1/8, 1/2, 1/4, 1/8
    kept = {p: _kept(mass, Sampling(top_p=p).drawing)[0].tolist() for p in (0.5, 0.51, 0.75)}
    assert kept[0.5] == [False, True, False, False]
    assert kept[0.51] == kept[0.75] == [False, True, True, False]


def drawn(mass, uniforms):
    """The tokens that two uniforms choose from a mass relative to the likeliest token's."""
    blocks = _in_blocks(jnp.log(mass))
    return _chosen(blocks, *_of_blocks(blocks, lambda x, kind: x), uniforms, greedy=False)


def test_a_token_without_mass_is_never_drawn():
    """At the ends of the uniform's range, with zero mass first, last and between."""
    mass = jnp.asarray([[0.0, 0.0, 0.4, 0.0, 0.6, 0.0]])
    edges = [0.0, 1e-7, 0.39999, 0.4, 0.40001, 1 - 2**-24]
    uniforms = jnp.asarray([[a, b] for a in edges for b in edges])
    tokens = drawn(jnp.tile(mass, (len(uniforms), 1)), uniforms)
    assert set(tokens.tolist()) == {2, 4}


def test_two_uniforms_reach_the_tail_of_a_long_vocabulary():
    """Next to a likely token, single steps of the running sum are lost in float32; blocks are not.

    1,024 tokens in 128 blocks of 8: the first block holds the likely token alone, every other
    token has 5e-8 of its mass. A float32 uniform is a multiple of 2^-23.
    """
    mass = np.full(1024, 5e-8, np.float32)
    mass[0], mass[1:8] = 1.0, 0.0
    block = 1 - np.arange(1, 600) / 2**23
    u = np.array([(a, (b + 0.5) / 8) for a in block for b in range(8)], np.float32)
    tokens = jax.jit(jax.vmap(lambda u: drawn(mass[None], u[None])[0]))(u)
    assert set(tokens.tolist()) - {0} == set(range(8, 1024))
    running = np.cumsum(mass)
    single = np.searchsorted(
        running, (1 - np.arange(2**12) / 2**23).astype(np.float32) * running[-1], "right"
    )
    assert len(set(single.tolist())) < 500


@functools.cache
def start(sampler):
    """Weights, trunk and cache of two prompts with two rows each, without tools around."""
    prompts, tree = helpers.prompts()[:2], helpers.tree()
    params = sampler.export(helpers.weights())
    trunk = make_policy(helpers.tool_loop(sampler), params).preamble
    own = jax.tree.map(jnp.asarray, prompts_level(tree, prompts))
    return params, (*trunk, (sampler.prefill(params, trunk, own), own.valid))


def fresh_cache(sampler):
    rows = [p for p in helpers.prompts()[:2] for _ in range(2)]
    last = np.array([p[-1] for p in rows], np.int32)
    return sampler.begin(jnp.asarray(last), jnp.asarray([len(p) - 1 for p in rows], jnp.int32))


def decode(sampler, cache, live, remaining):
    return sampler.decode(
        *start(sampler), cache, keys(4), jnp.where(jnp.asarray(live), jnp.asarray(remaining, jnp.int32), 0)
    )


@pytest.fixture(scope="module")
def script():
    return helpers.Script()


@pytest.mark.parametrize(
    "ways",
    [
        [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.3}],
        [{"top_p": 0.9}, {"temperature": 0.6, "top_p": 0.5}],
    ],
    ids=["whole", "nucleus"],
)
def test_ways_of_sampling_that_differ_in_numbers_are_one_program(ways):
    first, *others = (helpers.new_sampler(**way) for way in ways)
    of_first = np.asarray(decode(first, fresh_cache(first), [True] * 4, [8] * 4)[1].logprobs)
    begun = [(sampler, fresh_cache(sampler), start(sampler)) for sampler in others]
    before = launch.compiles()
    for sampler, cache, _ in begun:
        logprobs = np.asarray(decode(sampler, cache, [True] * 4, [8] * 4)[1].logprobs)
        assert np.abs(logprobs - of_first).max() > 1e-3  # and it is another way
    assert launch.compiles() == before


def test_greedy_decoding_is_the_argmax_of_a_flat_forward():
    sampler = helpers.new_sampler(temperature=0)
    _, turn = decode(sampler, fresh_cache(sampler), [True, False, True, False], [30, 30, 30, 30])
    assert turn.count.tolist()[1::2] == [0, 0]
    prompts = helpers.prompts()[:2]
    rows = [[*p, *turn.tokens[2 * i, : turn.count[2 * i]].tolist()] for i, p in enumerate(prompts)]
    tokens, valid = pad_rows(rows, max(map(len, rows)))
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (2, 1))

    @jax.jit
    def flat(params):
        (hidden,), _ = extend(
            params,
            (Level(*map(jnp.asarray, (tokens, positions, valid))),),
            cfg=helpers.config(),
            dtype=helpers.FLOAT32,
        )
        return jax.nn.log_softmax(hidden @ head_weights(params).T)

    table = flat(helpers.weights())
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        at = np.arange(len(prompt) - 1, len(row) - 1)
        assert len(at) > 0
        assert np.argmax(table[i, at], -1).tolist() == row[len(prompt) :]
        logprobs = turn.logprobs[2 * i, : len(at)]
        np.testing.assert_allclose(logprobs, table[i, at, row[len(prompt) :]], atol=1e-4)


def test_a_row_ends_with_its_stop_token_or_its_budget(script):
    """Row 0 stops by itself, row 1 has room for three tokens, row 2 none, row 3 does not live."""
    script.load([[7, 8, END, 9], [7] * 9, [7], [7]])
    cache, turn = decode(
        script.sampler, fresh_cache(script.sampler), [True, True, True, False], [50, 3, 0, 50]
    )
    assert turn.count.tolist() == [3, 3, 0, 0]
    assert turn.stopped.tolist() == [True, False, False, False]
    assert turn.tokens[:, :4].tolist() == [[7, 8, END, 0], [7, 7, 7, 0], [0] * 4, [0] * 4]
    assert not turn.tokens[:, 3:].any()
    assert (turn.logprobs[:2, :3] < 0).all() and not turn.logprobs[:, 3:].any()
    assert cache.length.tolist() == [3, 3, 0, 0]  # the prompt's last token and all but the last sampled
    assert cache.pending.tolist() == [END, 7, *fresh_cache(script.sampler).pending[2:].tolist()]


@pytest.mark.parametrize("stop", helpers.conversation().stop_ids)
def test_every_stop_id_ends_a_row(script, stop):
    script.load([[stop, 5]])
    _, turn = decode(script.sampler, fresh_cache(script.sampler), [True] * 4, [9] * 4)
    assert turn.tokens[0, :2].tolist() == [stop, 0] and turn.stopped.all()


def test_a_stop_token_on_the_last_place_of_the_budget_counts(script):
    script.load([[7, END]])
    _, turn = decode(script.sampler, fresh_cache(script.sampler), [True] * 4, [2] * 4)
    assert turn.count[0] == 2 and turn.stopped[0]


def test_finished_rows_do_not_advance(script):
    """Rows 1 and 3 rest through a decode and an append: their slots, counts and tokens stay."""
    sampler = script.sampler
    script.load([[7] * 6, [7, 8, END], [8] * 6, [END]])
    cache, _ = decode(sampler, fresh_cache(sampler), [True] * 4, [5] * 4)
    before = jax.device_get(cache)
    cache, turn = decode(sampler, cache, [True, False, True, False], [5] * 4)
    tokens = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    count = jnp.asarray([3, 0, 2, 0], jnp.int32)
    cache = sampler.append(*start(sampler), cache, tokens, count, jnp.full(4, 9, jnp.int32))
    after = jax.device_get(cache)
    assert turn.count.tolist()[1::2] == [0, 0]
    for row in (1, 3):
        n = before.length[row]
        assert after.length[row] == n and after.position[row] == before.position[row]
        assert after.pending[row] == before.pending[row]
        for old, new in zip(jax.tree.leaves(before.kv), jax.tree.leaves(after.kv), strict=True):
            assert (old[row, :, :n] == new[row, :, :n]).all()
    assert after.length[0] == before.length[0] + turn.count[0] + 3
    assert after.pending[0] == 9


def test_decode_comes_back_once_few_rows_go_on(script):
    """Row 1 ends first, then row 3; at most two continue then. The rest is decoded by the next call."""
    script.load([[7] * 9, [7, END], [8] * 8, [7, 7, END]])
    cache, turn = script.sampler.decode(
        *start(script.sampler), fresh_cache(script.sampler), keys(4), jnp.full(4, 9), 2
    )
    assert turn.count.tolist() == [3, 2, 3, 3] and turn.stopped.tolist() == [False, True, False, True]
    assert turn.row_steps == 12
    cache, turn = decode(script.sampler, cache, [True, False, True, False], [6, 0, 6, 0])
    assert turn.count.tolist() == [6, 0, 6, 0] and turn.stopped.tolist() == [False, False, True, False]
    assert turn.tokens[2, :6].tolist() == [8] * 5 + [END]
    assert cache.length.tolist() == [9, 2, 9, 3]


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [
        (44, (45,)),
        (190, (191,)),
        (191, (128, 192)),
        (1024, (128, 256, 512, 1025)),
        (1536, (128, 256, 512, 1024, 1537)),
    ],
)
def test_a_cache_doubles_up_to_its_budget(budget, sizes):
    assert cache_sizes(budget) == sizes


def test_an_accelerator_fills_the_same_cache():
    """Its own way of writing, traced for one and run here: two decodes, of all rows and of two, and a response."""

    def filled(budget, devices):
        layout = helpers.layouts()[1]
        sampler = make_sampler(
            helpers.config(), layout, dtype=helpers.FLOAT32, sampling=Sampling(), stop_ids=(), budget=budget
        )
        with compiling_for(devices):
            cache, first = decode(sampler, fresh_cache(sampler), [True] * 4, [4, 2, 3, 1])
            count, pending = jnp.asarray([3, 0, 2, 0], jnp.int32), jnp.full(4, 9, jnp.int32)
            tokens = jnp.tile(jnp.arange(16, dtype=jnp.int32), (4, 1))
            cache = sampler.append(*start(sampler), cache, tokens, count, pending)
            cache, second = decode(sampler, cache, [True, False, True, False], [5] * 4)
        valid = jnp.arange(30)[None] < cache.length[:, None]
        kv = [jnp.where(valid[:, None, :, None], x[:, :, :30], 0) for x in jax.tree.leaves(cache.kv)]
        return cache, kv, (first.tokens, second.tokens), (first.logprobs, second.logprobs)

    # budgets differ, since what is traced for one kind of device would serve the other too
    (cache, *want), (other, *got) = filled(40, jax.devices()), filled(41, [SimpleNamespace(platform="gpu")])
    assert cache.room + 1 == 41 and other.room + 1 == 48  # whole tiles
    assert cache.length.tolist() == other.length.tolist() == [12, 2, 10, 1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), want, got)


def decoded_whole(sampler, cache) -> tuple[list[np.ndarray], list[int]]:
    """(tokens and log-probabilities [4, 200], slots of the cache at each decode)."""
    parts, slots, left, held = [], [], np.full(4, 200, np.int32), 0
    while left.any():
        cache = sampler.fit(cache, held + 1)
        slots.append(cache.room + 1)
        cache, turn = decode(sampler, cache, [True] * 4, left)
        n = turn.count[0]
        held += int(n)
        parts.append((turn.tokens[:, :n], turn.logprobs[:, :n]))
        left = left - turn.count
    return [np.hstack(arrays) for arrays in zip(*parts, strict=True)], slots


def test_a_cache_that_grows_gives_what_one_of_full_size_gives():
    """Free sampling without a stop token: 200 tokens a row over a cache of 128 slots, then 257."""
    layout = helpers.layouts()[1]
    sampler = make_sampler(
        helpers.config(), layout, dtype=helpers.FLOAT32, sampling=Sampling(), stop_ids=(), budget=BUDGET
    )
    rows = [p for p in helpers.prompts()[:2] for _ in range(2)]
    ends, positions = jnp.asarray([p[-1] for p in rows]), jnp.asarray([len(p) - 1 for p in rows])
    (tokens, logprobs), slots = decoded_whole(sampler, sampler.begin(ends, positions))
    (expected, expected_logprobs), full = decoded_whole(sampler, sampler.begin(ends, positions, BUDGET + 1))
    assert slots == [128] * 4 + [257] * 3 and set(full) == {257}
    assert (tokens == expected).all() and tokens.shape == (4, 200)
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5)


def layout_of(data):
    return Layout(AbstractMesh((data, 1, 1), ("data", "fsdp", "tensor")), rollout=True)


def trunk_of(*shapes):
    return tuple((None, jax.ShapeDtypeStruct(shape, bool)) for shape in shapes)


@pytest.mark.parametrize(
    ("B", "data", "trunk", "sizes"),
    [
        (32, 1, [(1, 5888), (4, 128)], (32, 4)),
        (32, 8, [(1, 5888), (4, 128)], (32, 8)),
        (8, 8, [(1, 5888), (1, 128)], (8,)),
        (4, 1, [], (4, 1)),
        (1, 1, [], (1,)),
        # 4 rows would hold 4 · (5888 + 513) slots, all 32 hold 4 · 5888 + 32 · 513; 16 of 128 16 · (5888 + 513)
        (32, 1, [(4, 5888)], (32, 4)),
        (128, 1, [(4, 5888)], (128,)),
    ],
)
def test_decode_shrinks_to_an_eighth(B, data, trunk, sizes):
    assert part_sizes(B, 513, trunk_of(*trunk), layout_of(data)) == sizes


def test_compaction_pays_on_a_cpu_where_a_row_costs_more_than_compiling(monkeypatch):
    quickstart = ModelConfig("qwen3", 700, 128, 384, 4, 4, 2, 32, 1e4, 1e-6, True)
    smollm2 = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e5, 1e-5, True)
    assert compaction_pays(quickstart, 191) and not compaction_pays(quickstart, 63)
    assert compaction_pays(smollm2, 63)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not compaction_pays(smollm2, 512)


def test_decode_holds_the_cache_once():
    """Written after it is read, a cache is updated in place; XLA would else copy it whole in every step."""
    sampler = helpers.new_sampler()
    cache = sampler.fit(fresh_cache(sampler), sampler.budget)
    args = (*start(sampler), cache, keys(4), jnp.ones(4, jnp.int32))
    temporary = sampler.decode.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporary < sum(x.nbytes for x in jax.tree.leaves(cache.kv))


def test_appended_tokens_are_as_if_they_had_been_decoded(script):
    """The same tokens through decode and through append leave the same cache."""
    sampler = script.sampler
    tokens = [11, 12, 13, 14, 15, 16]
    script.load([tokens] * 4)
    decoded, _ = decode(sampler, fresh_cache(sampler), [True] * 4, [6] * 4)
    decoded = jax.device_get(decoded)
    cache = fresh_cache(sampler)
    fed = np.zeros((4, 16), np.int32)
    fed[:, 0], fed[:, 1:6] = cache.pending, tokens[:-1]
    last = jnp.full(4, tokens[-1], jnp.int32)
    appended = sampler.append(*start(sampler), cache, fed, jnp.full(4, 6, jnp.int32), last)
    for name in ("length", "pending", "position"):
        assert (getattr(decoded, name) == getattr(appended, name)).all()
    for a, b in zip(jax.tree.leaves(decoded.kv), jax.tree.leaves(appended.kv), strict=True):
        np.testing.assert_allclose(a[:, :, :6], b[:, :, :6], atol=1e-4)


def test_exported_weights_are_the_stack_taken_apart():
    exported = helpers.new_sampler(dtype=helpers.BFLOAT16).export(helpers.weights())
    q = helpers.weights()["layers"]["attention"]["q"]
    assert len(exported["layers"]) == helpers.config().L
    assert (exported["layers"][1]["attention"]["q"] == q[1].astype(jnp.bfloat16)).all()
    assert {x.dtype for x in jax.tree.leaves(exported)} == {helpers.BFLOAT16}


def test_row_keys_differ_by_seed_draw_and_generation():
    found = {
        tuple(row_keys(seed, np.array([draw]), np.array([g]))[0].tolist())
        for seed in range(2)
        for draw in range(4)
        for g in range(4)
    }
    assert len(found) == 32
