"""Drafts: what is proposed, and that they change no token."""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rollout import drafts, loop, sampler
from grpo_jax.rollout.drafts import COMPARED, DRAFTED, NEAR, NONE, known_texts, propose

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import scripted

SEED = 5
TOKENS = st.lists(st.integers(-1, 3), min_size=2, max_size=40)


def proposed(recent, text, at=0):
    recent = [*recent[::-1], *[NONE] * COMPARED][:COMPARED]
    draft, end = propose(jnp.asarray([recent]), jnp.asarray([text]), jnp.asarray([at]))
    return draft[0].tolist(), int(end[0])


def longest_match(recent, text, at):
    """(draft, end) by definition: first a match near `at`, then the longest common suffix, then the next one."""

    def run(j):
        n = 0
        while n < min(COMPARED, len(recent), j + 1) and text[j - n] == recent[-1 - n] >= 0:
            n += 1
        return n

    ends = [j for j in range(len(text) - 1) if text[j + 1] >= 0 and run(j)]
    if not ends:
        return None
    after = [(j - at) % len(text) for j in range(len(text))]
    best = max(ends, key=lambda j: (after[j] < NEAR, run(j), -after[j]))
    following = text[best + 1 : best + 1 + DRAFTED]
    return following + [NONE] * (DRAFTED - len(following)), best


def test_a_draft_continues_the_longest_match():
    """ "… 7 8 9" was followed by 1 after "6 7 8 9" and by 2 after "5 7 8 9"."""
    text = [6, 7, 8, 9, 1, 1, 5, 7, 8, 9, 2, 3]
    assert proposed([5, 7, 8, 9], text) == ([2, 3] + [NONE] * (DRAFTED - 2), 9)
    assert proposed([6, 7, 8, 9], text)[0] == [1, 1, 5, 7, 8, 9, 2][:DRAFTED]


def test_a_match_near_the_last_copy_is_taken_first():
    """The value of the first parameter is the row's own; after it the text's second parameter follows."""
    text = [50, 51, 8, 9, 52, 53, 8, 9, 54] + [0] * 20 + [7, 8, 9, 99]
    assert proposed([7, 8, 9], text, at=30)[0][0] == 99
    assert proposed([7, 8, 9], text, at=5)[0][0] == 54


def test_equal_matches_are_taken_in_the_order_of_the_text():
    text = [4, 10, 4, 11, 4, 12, 4, 13]
    assert [proposed([4], text, at)[0][0] for at in (0, 1, 3, 7)] == [10, 11, 12, 10]


def test_nothing_is_drafted_where_nothing_matches():
    assert proposed([9], [1, 2, 3])[0] == [NONE] * DRAFTED
    assert proposed([3], [1, 2, 3])[0] == [NONE] * DRAFTED  # nothing follows it
    assert proposed([2], [1, 2, NONE, 3])[0] == [NONE] * DRAFTED


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=10), TOKENS, st.integers(0, 60))
def test_drafts_are_those_of_the_definition(recent, text, at):
    text = (text + [NONE] * 40)[:40]  # one shape
    expected = longest_match(recent, text, at)
    draft, end = proposed(recent, text, at)
    assert draft == [NONE] * DRAFTED if expected is None else (draft, end) == expected


def rolled_out(drafting, sampling, script=None, **more):
    """(trajectories, work) of two prompts with three completions each, with drafts always or never."""
    with (
        mock.patch.object(loop, "pays", lambda rows, known: drafting),
        mock.patch.object(sampler, "sample", script or sampler.sample),
    ):
        if script:
            sampler._functions_of.cache_clear()  # new functions, so that the script is traced
        made = helpers.new_sampler(**sampling)
        if script:
            sampler._functions_of.cache_clear()
        of = helpers.tool_loop(made, drafts=True, **more)
        policy = loop.make_policy(of, made.export(helpers.weights()))
        prompts = [helpers.prompt(ids, draw) for draw, ids in enumerate(helpers.prompts()[:2])]
        rollout = loop.roll_out(of, policy, prompts, generations=3, seed=SEED)
    return rollout.trajectories, rollout.work


def assert_same(drafted, plain):
    """The same tokens, statuses and calls; log-probabilities up to the order of sums."""
    for one, other in zip(drafted, plain, strict=True):
        assert one.completion_ids == other.completion_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        same = {"completion_ids": [], "logprobs": [], "calls": []}
        assert dataclasses.replace(one, **same) == dataclasses.replace(other, **same)
        texts = [[(call, result.text) for call, result in t.calls] for t in (one, other)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.6, "min_p": 0.05},
    ],
    ids=str,
)
def test_drafts_change_no_token(sampling):
    """The model's own draws, to the end of the budget; where it repeats itself drafts are right."""
    (drafted, work), (plain, passes) = rolled_out(True, sampling), rolled_out(False, sampling)
    assert_same(drafted, plain)
    assert passes.tokens_per_pass == 1
    assert work.sampled == passes.sampled
    if sampling["temperature"] < 0.5:
        assert work.tokens_per_pass > 1.5


def test_calls_and_answers_take_few_passes():
    """Two tool turns, one of them longer for some completions, and an answer that repeats the result."""
    answered, talk = helpers.conversation(), helpers.text_ids
    turns = []
    for row in range(6):
        ids = [*talk("I will add. " * (row % 3))[:-1]] if row % 3 else []
        ids += helpers.call_ids("add", a=3, b=4) + answered.response_ids([("add", "Sum: 7")])
        ids += helpers.call_ids("multiply", a=12, b=30 + row)
        ids += answered.response_ids([("multiply", f"Product: {12 * (30 + row)}")])
        turns.append(ids + talk(f"Product: {12 * (30 + row)}"))
    prompts = [helpers.prompt(ids) for ids in helpers.prompts()[:2]]
    (drafted, work), (plain, _) = (
        rolled_out(on, {}, scripted.forced(prompts, turns, seed=SEED)) for on in (True, False)
    )
    assert [t.completion_ids for t in plain] == turns
    assert_same(drafted, plain)
    assert work.tokens_per_pass > 2


def test_a_call_of_every_tool_is_known_before_one_is_written():
    prompts = [helpers.prompt(ids) for ids in helpers.prompts()[:2]]
    width = max(len(prompt.ids) for prompt in prompts)
    known = known_texts(helpers.conversation(), prompts, width)
    for row, prompt in zip(known, prompts, strict=True):
        text = helpers.conversation().tokenizer.decode([t for t in row if t >= 0])
        assert '"name": "add", "arguments": {"a": 0, "b": 0}' in text
        assert row[len(row) - width :].tolist()[: len(prompt.ids)] == prompt.ids


def test_drafts_pay_where_a_pass_of_many_tokens_is_cheap():
    assert drafts.pays(1, None)
    assert not drafts.pays(128, 3.5)
    assert not drafts.pays(1, 0.5)
