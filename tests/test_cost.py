"""What a step costs, as XLA counts it in the compiled programs: the preamble is paid once.

FLOP and bytes, never seconds. The bounds are the formulas of grpo_jax/models/cost.py with what XLA adds; a
batch that pays the preamble per row is compiled as well, and breaks them.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.models import attention, qwen
from grpo_jax.models.attention import attend
from grpo_jax.models.qwen import ModelConfig
from grpo_jax.update.batch import Tree, bucket
from grpo_jax.update.update import GrpoObjective, batch_loss

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import job

from grpo_jax.models import cost
from grpo_jax.models.cost import Lengths

pytestmark = pytest.mark.slow

CFG = ModelConfig("qwen3", 1024, 128, 384, 2, 4, 2, 32, 1e4, 1e-6, True)
FOUR = Lengths(P=2, G=4, T0=512, T1=64, T2=64)  # each length fills its bucket
EIGHT = dataclasses.replace(FOUR, G=8)
SLACK = 1.06  # softmax, norms, drawing a token
BLOCK = 4 << 20  # bytes of attention scores: smaller than all of these shapes', else it would grow with them
LAYER_BYTES = 8 * (4 * CFG.D + 4 * CFG.N * CFG.H + 3 * CFG.F)  # of a token, with cotangents
MEMORY_SLACK = 1.25  # XLA's buffers do not fit one another exactly


@functools.cache
def make_job(lengths: Lengths, shared: bool = True) -> job.Job:
    """The step; not `shared`: every row carries its whole prompt, as in a flat batch."""
    if shared:
        return job.make_job(job.Shape(CFG, lengths, remat=True))
    flat = make_job(dataclasses.replace(lengths, P=lengths.B, G=1))
    tree = Tree((), 0, bucket(len(flat.prompts[0]) - 1), lengths.T2)
    return dataclasses.replace(flat, tree=tree)


def unstacked(params):
    """Layers as a list are unrolled; XLA counts the body of a loop once."""
    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(CFG.L)]
    return dict(params, layers=layers)


@functools.cache
def gradient_flop(lengths: Lengths, shared: bool = True, form=unstacked) -> float:
    """XLA's FLOP of loss and gradient, no loops left but that over layers where `form` keeps their stack."""
    of = make_job(lengths, shared)

    def loss(params, batch):
        return batch_loss(of.step, GrpoObjective(), params, batch)[0]

    params = jax.eval_shape(lambda: form(job.random_weights(CFG)))
    whole = functools.partial(attend, score_bytes=1 << 40)
    with mock.patch.object(qwen, "attend", whole):
        compiled = jax.jit(jax.grad(loss)).lower(params, job.abstract_batch(of)).compile()
    return compiled.cost_analysis()["flops"]


@functools.cache
def update_temporary(lengths: Lengths, shared: bool = True) -> int:
    """XLA's temporary bytes of the update as it is run."""
    of = make_job(lengths, shared)
    state = jax.eval_shape(of.new_state)
    with mock.patch.object(attention, "score_block_bytes", lambda on_cpu: BLOCK):
        compiled = of.update.lower(state, job.abstract_batch(of)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def flop_bound(x: Lengths) -> float:
    """The formula, with the causal level's masked half, which XLA computes."""
    per_key = 14 * CFG.N * CFG.H / 2
    shared = (CFG.L - 1) * per_key * (x.T0**2 + x.P * x.T1**2)
    masked = shared + CFG.L * per_key * x.B * x.T2**2
    return SLACK * (sum(cost.update_flop(CFG, x, remat=True).values()) + masked)


def memory_bound(x: Lengths) -> float:
    """With remat: gradients, what all layers keep, one layer's values and their cotangents (4D + 4NH + 3F a token),
    and three arrays of the size of a block of scores and of the logits; all in fp32.
    """
    tokens, logits = x.T0 + x.P * x.T1 + x.B * x.T2, 4 * x.B * x.T2 * CFG.V
    per_token = cost.kept_bytes(CFG, 4) + LAYER_BYTES
    return MEMORY_SLACK * (4 * cost.weights(CFG) + tokens * per_token + 3 * (BLOCK + logits))


@pytest.mark.parametrize("lengths", [FOUR, EIGHT])
def test_an_update_costs_what_the_formula_says(lengths):
    assert gradient_flop(lengths) < flop_bound(lengths)
    assert update_temporary(lengths) < memory_bound(lengths)


def test_twice_the_completions_add_only_their_own_share():
    levels = cost.update_flop(CFG, FOUR, remat=True)
    own = levels["completions"] + levels["head"]
    added = gradient_flop(EIGHT) - gradient_flop(FOUR)
    assert added < SLACK * own
    bytes_of_a_token = cost.kept_bytes(CFG, 4) + LAYER_BYTES + 12 * CFG.V
    grown = update_temporary(EIGHT) - update_temporary(FOUR)
    assert grown < FOUR.B * FOUR.T2 * bytes_of_a_token


def test_the_last_layer_of_a_stack_makes_no_more_of_shared_levels_than_keys_and_values():
    """Of two layers one is in the loop, whose body XLA counts once. The rule looks at tokens: most are shared."""
    stacked = gradient_flop(FOUR, form=lambda params: params)
    assert stacked == pytest.approx(gradient_flop(FOUR), rel=0.01)


def test_a_preamble_for_every_row_breaks_the_bounds():
    assert gradient_flop(EIGHT, shared=False) > 2 * flop_bound(EIGHT)
    assert update_temporary(EIGHT, shared=False) > memory_bound(EIGHT)


# --- rollout -----------------------------------------------------------------------------------------


def rollout_weights(x: Lengths):
    return jax.eval_shape(lambda: make_job(x).sampler.export(job.random_weights(CFG)))


def prefill(x: Lengths, params):
    """The trunk; without the sampler's jit, which names compiler options and may not stand within another."""
    of = make_job(x)
    bare = dataclasses.replace(of.sampler, prefill=of.sampler.prefill.__wrapped__)
    return job.prefill(dataclasses.replace(of, sampler=bare), params)


def decode_cost(x: Lengths) -> tuple[float, int]:
    """(FLOP of one step at a full cache, temporary bytes)."""
    of, params, rows = make_job(x), rollout_weights(x), jax.ShapeDtypeStruct((x.B,), jnp.int32)
    trunk = jax.eval_shape(functools.partial(prefill, x), params)
    cache = jax.eval_shape(of.sampler.begin, rows, rows)
    keys = jax.ShapeDtypeStruct((x.B, 2), jnp.uint32)
    compiled = of.sampler.decode.lower(params, trunk, cache, keys, rows).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def test_prefill_costs_what_the_formula_says_however_many_completions():
    masked = (CFG.L - 1) * 4 * CFG.N * CFG.H / 2 * (FOUR.T0**2 + FOUR.P * FOUR.T1**2)
    bound = SLACK * (sum(cost.prefill_flop(CFG, FOUR).values()) + masked)
    for x in (FOUR, EIGHT):
        compiled = jax.jit(functools.partial(prefill, x)).lower(rollout_weights(x)).compile()
        assert compiled.cost_analysis()["flops"] < bound


def test_decoding_neither_repeats_the_preamble_nor_copies_it():
    """XLA counts the loop's body once: one token of every row."""
    flop, temporary = decode_cost(EIGHT)
    assert flop < SLACK * cost.decode_step(CFG, EIGHT, EIGHT.T2, itemsize=4)[0]
    copied = EIGHT.B * 2 * CFG.K * EIGHT.T0 * CFG.H * 4  # keys and values of one layer, for every row
    assert temporary < copied / 2
    assert temporary < 2 * decode_cost(FOUR)[1]


# --- several devices ---------------------------------------------------------------------------------


def test_eight_devices_divide_the_work_and_gather_no_logits():
    """Ratios to an even division, of update, prefill and decode: 1.6 and 4.4 where each computed all prompts."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "benchmarks/devices.py", "8x1x1", "1x4x2"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, *lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["8x1x1", "1x4x2"]
    for line in lines:
        assert all(0.95 < float(ratio) < 1.1 for ratio in line.split()[1:5]), line
        assert "vocabulary" not in line
