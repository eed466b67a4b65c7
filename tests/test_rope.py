"""Rotary frequencies worked by hand, and what a config.json may say of them.

YaRN in whole models: `test_qwen_golden.py` and `test_qwen_torch.py`.
"""

import math
import re

import numpy as np
import pytest

from grpo_jax.models.rope import Yarn, frequencies, read_position_limit, read_rope

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}  # as Qwen2.5 documents it
CONFIG = {"rope_theta": 1000000.0, "max_position_embeddings": 32768, "rope_scaling": YARN}
MAGNITUDE = 1.1386294361  # 0.1 · ln 4 + 1
POWERS = [10 ** (-6 * i / 8) for i in range(8)]  # theta^(-2i/H) of 8 frequencies


def test_without_scaling_frequencies_are_powers_of_theta():
    got = frequencies(1e6, 16)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, POWERS, rtol=1e-7)


def test_yarn_by_hand():
    """32 turns in 32,768 positions lie at 16·ln(32768/64π)/(2·ln 10⁶) = 2.95, one turn at 4.96.

    So a ramp from 2 to 5: frequencies 0 to 2 are kept, from 5 on a quarter is left, and of 3
    and 4 a third and two thirds are divided by four: 1 − 3/4 · 1/3 = 3/4 and 1 − 3/4 · 2/3 = 1/2.
    """
    theta, yarn = read_rope(CONFIG, "x.json")
    assert (theta, yarn.factor, yarn.original, yarn.beta_fast, yarn.beta_slow) == (1e6, 4, 32768, 32, 1)
    assert math.isclose(yarn.attention_factor, MAGNITUDE, rel_tol=1e-9)
    kept = np.array([1, 1, 1, 0.75, 0.5, 0.25, 0.25, 0.25])
    got = frequencies(theta, 16, yarn)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, kept * POWERS, rtol=3e-7)


def test_llama3_by_hand():
    """Waves of 2π·10^(3i/4) positions: 6.28, 35.3, 198.7, 1117. Of 256 original positions, high 4 and low 1
    make 64 and 256 the bounds: the first two are kept, the last is divided by 8, and the third, with
    256/198.69 = 1.28842 turns, keeps 0.28842/3 = 0.09614 of itself and an eighth of the rest: 0.20912.
    """
    options = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    options |= {"original_max_position_embeddings": 256, "rope_type": "llama3"}
    theta, scaling = read_rope({"rope_theta": 1000.0, "rope_scaling": options}, "x.json")
    kept = frequencies(theta, 8, scaling) * 10 ** (3 * np.arange(4) / 4)
    np.testing.assert_allclose(kept, [1, 1, 0.20912, 0.125], rtol=1e-4)
    with pytest.raises(ValueError, match=r"x.json: rope_scaling: low_freq_factor must be above 0"):
        read_rope({"rope_theta": 1.0, "rope_scaling": options | {"low_freq_factor": 4.0}}, "x.json")


def test_a_ramp_that_is_not_truncated_begins_between_frequencies():
    """From 2.94949 to 4.95636: frequency 3 is 0.05051 of 2.00687 up the ramp, 4 is 1.05051 of it."""
    got = frequencies(1e6, 16, Yarn(4.0, 32768, 1.0, truncate=False)) / POWERS
    np.testing.assert_allclose(got, [1, 1, 1, 0.98112, 0.60741, 0.25, 0.25, 0.25], atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {**YARN, "rope_type": "yarn"}},
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": {**YARN, "rope_theta": 1e6}},
        {"rope_theta": 5.0, "rope_scaling": {**YARN, "rope_theta": 1e6}},  # what is inside wins
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},  # the older form wins
        {"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": None, "attention_factor": None}},
        {"rope_scaling": {**YARN, "mscale": 2.0}},  # of no effect alone
        {"rope_scaling": {"factor": 4.0, "type": "yarn"}},  # max_position_embeddings is the original length
        {"original_max_position_embeddings": 32768, "rope_scaling": {**YARN, "original_max_position_embeddings": 5}},
    ],
)  # fmt: skip
def test_forms_that_mean_the_same(config):
    assert read_rope(CONFIG | config, "x.json") == read_rope(CONFIG, "x.json")


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ({"attention_factor": 0.5}, "attention_factor", 0.5),
        ({"attention_factor": 0.5, "mscale": 1.0, "mscale_all_dim": 2.0}, "attention_factor", 0.5),
        # (0.1 · 2 · ln 4 + 1) / (0.1 · 1 · ln 4 + 1)
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, "attention_factor", 1.2772588722 / MAGNITUDE),
        ({"beta_fast": 16}, "beta_fast", 16),
        ({"beta_slow": 2.0}, "beta_slow", 2.0),
        ({"truncate": False}, "truncate", False),
        ({"factor": 1}, "attention_factor", 1.0),
    ],
)
def test_options_of_yarn(option, field, value):
    yarn = read_rope(CONFIG | {"rope_scaling": YARN | option}, "x.json")[1]
    np.testing.assert_allclose(getattr(yarn, field), value, rtol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "su"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_other_types_are_errors_that_name_the_key(kind, key, name):
    config = {"rope_theta": 1e6, key: {name: kind, "factor": 2.0}}
    message = f"x.json: {key}: the rope type must be 'default', 'yarn' or 'llama3', got '{kind}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_rope(config, "x.json")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "yarn has no option partial_rotary_factor; it has attention_factor"),
        ({"factor": 0.5}, "factor must be a number >= 1, got 0.5"),
        ({"factor": None}, "factor must be a number >= 1, got None"),
        ({"original_max_position_embeddings": "32k"}, "original_max_position_embeddings must be a number >= 1"),
        ({"beta_fast": 1, "beta_slow": 2}, "beta_fast must be >= beta_slow, got 1 and 2"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_errors_that_name_the_key(option, message):
    with pytest.raises(ValueError, match=f"x.json: rope_scaling: {message}"):
        read_rope(CONFIG | {"rope_scaling": YARN | option}, "x.json")


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 40960}, 40960),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
    ],
)
def test_positions_count_yarns_factor_once(config, positions):
    """Qwen2.5 and Qwen3 write it in these three ways."""
    _, yarn = read_rope({"rope_theta": 1e6} | config, "config.json")
    assert read_position_limit(config, yarn) == positions
