"""The least work of a step: worked by hand for a tiny model, and as XLA counts it in the real functions."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.models.qwen import Level, ModelConfig

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import compare_trl
import job

from grpo_jax.models import cost
from grpo_jax.models.cost import Lengths, Rates

ROOT = Path(__file__).parents[1]

# W = 2·2·1·(2 + 1) + 3·2·3 = 30 weights a layer, of which keys and values 4
BY_HAND = ModelConfig("qwen3", V=5, D=2, F=3, L=2, N=2, K=1, H=1, rope_theta=1e4, norm_eps=1e-6, tied=True)
LENGTHS = Lengths(P=2, G=3, T0=10, T1=4, T2=6)
EIGHTH = Lengths(P=2, G=3, T0=10, T1=4, T2=2)

CFG = ModelConfig("qwen3", 1024, 128, 384, 2, 4, 2, 32, 1e4, 1e-6, True)
FULL = Lengths(P=2, G=4, T0=256, T1=64, T2=64)  # each fills its bucket


def test_weights_by_hand():
    assert cost.layer_weights(BY_HAND) == 30
    assert cost.weights(BY_HAND) == 70
    assert cost.weights(dataclasses.replace(BY_HAND, tied=False)) == 80


def test_prefill_by_hand():
    """The first layer 60 + 8 a key, the last 8: 10·(60 + 8·5 + 8) and 8·(60 + 8·12 + 8)."""
    assert cost.prefill_flop(BY_HAND, LENGTHS) == {"preamble": 1080, "prompts": 1312}


def test_a_decode_step_by_hand():
    """6·(2·(60 + 8·17) + 20) FLOP; 4·(2·30 + 10 + 4·(10 + 8 + 18)) bytes."""
    assert cost.decode_step(BY_HAND, LENGTHS, t=2, itemsize=4) == (2472, 856)


def test_an_update_by_hand():
    """Per token and layer 180 + 28 a key, or 228 + 28 a key with remat; 80 a token for the head."""
    plain, remat = (cost.update_flop(BY_HAND, LENGTHS, remat) for remat in (False, True))
    assert plain == {"preamble": 3440, "prompts": 4320, "completions": 47232, "head": 2880}
    assert remat == {"preamble": 4000, "prompts": 4768, "completions": 50688, "head": 2880}


@pytest.mark.parametrize(
    ("machine", "least"),
    [(Rates(1000, 100), (6.64 + 7.6, "bytes")), (Rates(100, 1000), (22.8 + 23.76, "FLOP"))],
)
def test_decode_takes_the_longer_of_flop_and_bytes(machine, least):
    """Two steps of 2280 and 2376 FLOP, 664 and 760 bytes."""
    seconds, binds = cost.least_decode(BY_HAND, EIGHTH, machine, itemsize=4)
    assert (seconds, binds) == (pytest.approx(least[0]), least[1])


def test_least_seconds_are_flop_over_the_rate():
    machine = Rates(flops=100, bytes=1)
    assert cost.least_prefill(BY_HAND, LENGTHS, machine) == pytest.approx(23.92)
    assert cost.least_update(BY_HAND, LENGTHS, True, machine) == pytest.approx(623.36)


# --- against XLA -------------------------------------------------------------------------------------

TOLERANCE = 0.05  # softmax, norms, AdamW and drawing a token, which the formulas leave out


@functools.cache
def full_job():
    return job.make_job(job.Shape(CFG, FULL, remat=True))


def prefill(params, trunk, tokens, positions, valid):
    """The sampler's, without its jit: one that names compiler options may not stand within another."""
    level = Level(tokens, positions, valid, shared=True)
    return full_job().sampler.prefill.__wrapped__(params, trunk, level)


def tokens(n: int, T: int) -> list[jax.ShapeDtypeStruct]:
    """Abstract tokens, positions and validity of preamble or prompts."""
    return [jax.ShapeDtypeStruct((n, T), kind) for kind in (jnp.int32, jnp.int32, bool)]


@functools.cache
def rollout_shapes():
    """Abstract rollout weights, and the trunk of preamble and prompts."""
    params, trunk = jax.eval_shape(full_job().sampler.export, jax.eval_shape(full_job().new_state).params), ()
    for level in (tokens(1, FULL.T0), tokens(FULL.P, FULL.T1)):
        trunk += ((jax.eval_shape(prefill, params, trunk, *level), level[2]),)
    return params, trunk


def masked(tokens: int, T: int) -> float:
    """FLOP that XLA spends on the masked half of a shared level's own keys, in all layers but the last."""
    return tokens * (CFG.L - 1) * 4 * CFG.N * CFG.H * T / 2


def prefill_flop(params, trunk, n: int, T: int) -> float:
    return xla_flop(jax.jit(prefill), params, trunk, *tokens(n, T))


def test_prefill_equals_xlas_count():
    (params, trunk), flop = rollout_shapes(), cost.prefill_flop(CFG, FULL)
    preamble = flop["preamble"] + masked(FULL.T0, FULL.T0)
    assert prefill_flop(params, (), 1, FULL.T0) == pytest.approx(preamble, rel=TOLERANCE)
    prompts = flop["prompts"] + masked(FULL.P * FULL.T1, FULL.T1)
    assert prefill_flop(params, trunk[:1], FULL.P, FULL.T1) == pytest.approx(prompts, rel=TOLERANCE)


def test_a_decode_step_equals_xlas_count():
    """XLA counts the body of the loop once, and every slot of the cache as filled."""
    params, trunk = rollout_shapes()
    sampler, rows = full_job().sampler, jax.ShapeDtypeStruct((FULL.B,), jnp.int32)
    cache = jax.eval_shape(sampler.begin, rows, rows)
    keys = jax.ShapeDtypeStruct((FULL.B, 2), jnp.uint32)
    flop, _ = cost.decode_step(CFG, FULL, FULL.T2, itemsize=4)
    assert xla_flop(sampler.decode, params, trunk, cache, keys, rows) == pytest.approx(flop, rel=TOLERANCE)


def xla_flop(function, *args) -> float:
    return function.lower(*args).compile().cost_analysis()["flops"]


# --- the commands ------------------------------------------------------------------------------------

SMALL = ["--shape", "tiny", "--preamble", 30, "--prompt", 5, "--completion", 8, "--layers", 1]
SMALL += ["--prompts", 2, "--generations", 2]


def command(name: str, *words: object) -> list[str]:
    """The lines that a benchmark prints."""
    argv = [sys.executable, f"benchmarks/{name}.py", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=570)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.slow
def test_a_step_is_timed_by_part_and_compared_with_the_machine():
    lines = command("step", *SMALL, "--repeats", 1)
    assert lines[0].startswith("tiny: 2 × 2 rows, preamble 30, prompt 6, completion 8 tokens, 1 layers")
    timed = [line.split()[0] for line in lines if "first call" in line]
    assert timed == ["export", "prefill", "decode", "reward", "update"]
    shares = [float(share) for share in re.findall(r"s: +([\d.]+) % reached", "\n".join(lines))]
    assert len(shares) == 3 and all(0 < share < 100 for share in shares)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("micro_batches", [2, 4])  # of whole prompts, and of parts of them
def test_trl_runs_on_the_same_weights_prompts_and_lengths(micro_batches):
    pytest.importorskip("trl")
    trl = ["--compare", "trl", "--trl-steps", 1, "--trl-checkpointing", "on"]
    lines = command("step", *SMALL, "--repeats", 1, *trl, "--trl-micro-batches", micro_batches)
    assert re.fullmatch(r"ratio to TRL: \d+\.\dx", lines[-1])
    ours, theirs = map(float, re.findall(r"\d+\.\d+", next(x for x in lines if x.startswith("entropy"))))
    assert ours == pytest.approx(theirs, abs=0.1)  # weights not loaded would give ln 700 = 6.55


@pytest.mark.slow
def test_memory_is_told_for_a_doubled_vocabulary_and_preamble():
    lines = command("memory", *SMALL)
    assert [line.split("temporary")[0].strip() for line in lines[1:]] == ["as given", "V = 1400", "T0 = 60"]


@pytest.mark.slow
def test_growth_writes_a_table_and_a_picture(tmp_path):
    lines = command("growth", "--quick", "--repeats", 1, "--png", tmp_path / "growth.png")
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        sweep for sweep in ("preamble", "rows", "completion", "tool turns") for _ in range(2)
    ]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_completions_that_do_not_wait_take_about_as_many_steps_as_the_longest():
    lines = command("turns", "--layers", 1, "--repeats", 1, "--sleep", 0.0)
    ratios = [float(ratio) for ratio in re.findall(r"steps, ([\d.]+) times the longest", "\n".join(lines))]
    assert len(ratios) == 2 and all(1 <= ratio <= 1.15 for ratio in ratios)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "least"), [("maths", 2.2), ("financial", 2.5)])
def test_gold_conversations_take_few_passes_with_drafts(job, least):
    lines = "\n".join(command("drafts", "--job", job, "--layers", 1, "--generations", 2, "--repeats", 1))
    tokens = dict(re.findall(r"(with|without) drafts: ([\d.]+) tokens a pass", lines))
    assert float(tokens["with"]) >= least and float(tokens["without"]) == 1


@pytest.mark.slow
def test_a_measurement_for_gpus_runs_on_a_cpu_with_tiny_sizes(tmp_path):
    """Each kind once, as benchmarks/gpu.sh calls it: a line each, and shares that can be."""
    out = tmp_path / "gpu.jsonl"
    for arguments in (
        ("parity", "float32"),
        ("step", "qwen3-0.6b"),
        ("profile", "qwen3-0.6b"),
        ("drafts", "qwen3-1.7b", "--rows", 8),
    ):
        command("gpu", *arguments, "--out", out)
    parity, step, profile, drafts = map(json.loads, out.read_text().splitlines())
    assert parity["passed"] and 0 < parity["difference"]["max"] <= 1e-4
    assert 0 < step["decode_share_of_limit"] < 1 and 0 < step["update_share_of_product"] < 1
    assert drafts["with"]["tokens_per_pass"] > 2.5 > drafts["without"]["tokens_per_pass"] == 1
    for kernels in (profile["decode"], profile["update"]):
        assert len(kernels) == 5 and 0 < sum(share for _, share in kernels) <= 1


@pytest.mark.parametrize("cfg", [*job.MODELS.values(), job.narrow(700)])
def test_the_config_that_trl_reads_is_that_of_the_model(cfg):
    read = ModelConfig.from_hf(compare_trl.hf_config(cfg))
    assert dataclasses.replace(read, positions=None) == cfg
