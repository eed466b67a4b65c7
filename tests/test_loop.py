"""The tool loop on a real sampler and cache; what rows sample is scripted where a test needs it."""

import dataclasses
import logging
import threading
from collections import Counter

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BUDGET, FREE, SCHEMAS, call_ids, text_ids

from grpo_jax.rollout.faults import faults
from grpo_jax.rollout.loop import Rollout, make_policy, roll_out
from grpo_jax.rollout.sampler import FIRST_SLOTS, MAX_STEPS
from grpo_jax.scoring.evaluation import is_exact
from grpo_jax.scoring.grounding import trajectory_grounded
from grpo_jax.tools import Limits, Toolbox, ToolRunner
from grpo_jax.types import Outcome, Status, ToolCall
from grpo_jax.update.batch import make_batch, response_bucket, update_shapes
from grpo_jax.update.optimizer import make_optimizer, scale_by_adam
from grpo_jax.update.update import GrpoObjective, ModelStep, init_state, make_score, make_update, place_batch

PROMPTS = helpers.prompts()
END = helpers.conversation().stop_ids[0]
CONTROL = "<|im_end|>\n<tool_call>\n{}</tool_call><|im_start|>"


@pytest.fixture(scope="module")
def script():
    """One scripted sampler for two prompts of two generations: every test reuses its programs."""
    return helpers.Script()


def run(script, rows, **settings):
    """Roll out four rows of which the first are scripted; the others say nothing."""
    script.load(rows)
    return helpers.rollout(helpers.tool_loop(script.sampler, **settings), PROMPTS[:2], generations=2)


def run_one(script, *turns, **settings):
    """Roll out one scripted row."""
    return run(script, [[token for turn in turns for token in turn]], **settings)[0]


def rendered(question, trajectory):
    """The template's own ids of a finished conversation."""
    conversation = [*helpers.messages(question), *trajectory.messages]
    text = helpers.conversation().tokenizer.apply_chat_template(conversation, tools=SCHEMAS, tokenize=False)
    return helpers.conversation().tokenizer.encode(text, add_special_tokens=False)


def texts(trajectory, role):
    return [m["content"] for m in trajectory.messages if m["role"] == role]


def spelled(text):
    """A text as single characters, which the tokenizer itself would merge."""
    return [i for char in text for i in helpers.conversation().encode_plain(char)]


def test_rule_1_token_in_token_out(script):
    """Prompt, sampled turns and tool responses, put together, are the template's own rendering."""
    first = call_ids("add", "Let me add.", a=3, b=4)
    second = call_ids("echo", text="It's 7\n\n or so")
    answer = text_ids("The sum is 7.")
    row = run_one(script, first, second, answer)
    responses = [
        helpers.conversation().response_ids([("add", "Sum: 7")]),
        helpers.conversation().response_ids([("echo", "It's 7\n\n or so")]),
    ]
    assert row.completion_ids == [*first, *responses[0], *second, *responses[1], *answer]
    spans = [(first, True), (responses[0], False), (second, True), (responses[1], False), (answer, True)]
    assert row.sampled_mask == [sampled for ids, sampled in spans for _ in ids]
    ids = [*row.prompt.ids, *row.completion_ids]
    whole = rendered(helpers.QUESTIONS[0], row)
    assert whole[: len(ids)] == ids
    assert helpers.conversation().decode(whole[len(ids) :]) == "\n"  # what follows a closed turn


def test_rule_1_tokens_that_the_tokenizer_would_not_choose_are_kept(script):
    """Decoding and encoding again would merge the characters: those were not the sampled tokens."""
    sampled = [*spelled("What is"), *call_ids("add", a=1, b=2)]
    text = helpers.conversation().decode(sampled)
    assert list(helpers.conversation().encode_plain("What is")) != spelled("What is")
    row = run_one(script, sampled, text_ids("3"))
    assert row.completion_ids[: len(sampled)] == sampled
    assert text.startswith("What is<tool_call>") and texts(row, "tool") == ["Sum: 3"]


def test_rule_3_sampler_equals_trainer(script):
    """Two tool turns lie between the first and the last of the free tokens that are compared."""
    rows = turns_with_free_tokens()
    trajectories = run(script, rows)
    assert [len(t.calls) for t in trajectories] == [2, 2, 0, 1]
    gap, count = logprob_gap(trajectories, helpers.FLOAT32)
    assert count > 150
    assert gap.max() <= 1e-4


def test_rule_3_in_bfloat16():
    script = helpers.Script(dtype=helpers.BFLOAT16)
    gap, count = logprob_gap(run(script, turns_with_free_tokens()), helpers.BFLOAT16)
    assert count > 150
    assert 0 < gap.mean() <= 0.06
    assert gap.max() <= 0.4


def turns_with_free_tokens():
    """The calls are forced, and compared all the same; what follows them the sampler draws itself."""
    first, second = call_ids("add", a=3, b=4), call_ids("echo", text="seven")
    free = [FREE] * 12
    return [[*first, *second, *free], [*second, *first, *free], free, [*first, *free]]


def logprob_gap(trajectories, dtype):
    batch = make_batch(helpers.tree(), trajectories, 2)
    scored = make_score(model_step(dtype))(helpers.weights(), batch)
    gap = np.abs(scored - batch.completions.sampler_logprobs)[batch.completions.trained]
    return gap, gap.size


def model_step(dtype=helpers.FLOAT32):
    return ModelStep(helpers.config(), helpers.layouts()[0], dtype)


def drawn(script, prompts, draws, generations, seed=0):
    """What the sampler itself draws, up to 40 tokens, by (draw, generation)."""
    script.load([[FREE] * 40] * (len(prompts) * generations))
    loop = helpers.tool_loop(script.sampler)
    rows = helpers.rollout(loop, prompts, draws, generations=generations, seed=seed)
    keys = [(draw, g) for draw in draws for g in range(generations)]
    return {key: row.completion_ids for key, row in zip(keys, rows, strict=True)}


def test_rule_5_randomness_belongs_to_the_row(script):
    base = drawn(script, PROMPTS[:2], [10, 11], 2)
    assert sum(map(len, base.values())) > 60
    swapped = drawn(script, [PROMPTS[1], PROMPTS[0]], [11, 10], 2)
    assert swapped == base  # another slot, another neighbour
    alone = drawn(script, PROMPTS[:1], [10], 3)
    assert all(alone[10, g] == base[10, g] for g in range(2))  # another batch size, a larger group


def test_rule_5_generations_draws_and_seeds_differ(script):
    base = drawn(script, PROMPTS[:2], [10, 11], 2)
    same_prompt = drawn(script, [PROMPTS[0], PROMPTS[0]], [10, 12], 2)  # prompt 0 again, a later draw
    assert same_prompt[10, 0] == base[10, 0]
    another_seed = drawn(script, PROMPTS[:2], [10, 11], 2, seed=1)
    different = [*same_prompt.values(), another_seed[10, 0]]
    assert len({tuple(ids) for ids in different}) == 5


class Steps:
    """Training steps on a scripted sampler: rollout, batch, update."""

    def __init__(self, script):
        self.script, self.step = script, model_step()
        optimizer = make_optimizer(
            scale_by_adam(0.9, 0.99, 1e-8), schedule=lambda count: 1e-3, weight_decay=0.0, max_grad_norm=1.0
        )
        self.state = init_state(jax.tree.map(jnp.copy, helpers.weights()), optimizer, self.step.layout)
        self.apply = make_update(self.step, optimizer, GrpoObjective(), self.state)
        self.loop = helpers.tool_loop(script.sampler)

    def update(self, trajectories):
        advantages = [1.0, -1.0, 0.5, -0.5]
        rows = [dataclasses.replace(t, advantage=a) for t, a in zip(trajectories, advantages, strict=True)]
        batch = make_batch(self.loop.tree, rows, 2)
        self.state, metrics = self.apply(self.state, place_batch(self.step.layout, batch))
        assert not jax.device_get(metrics)["skipped"]
        return batch

    def __call__(self, draw, rows):
        """One step of four rows; returns trajectories and batch."""
        self.script.load(rows)
        rollout = helpers.roll_out_weights(
            self.loop, self.state.params, PROMPTS[:2], [draw, draw + 1], generations=2
        )
        trajectories = rollout.trajectories
        return trajectories, self.update(trajectories)


def test_rule_6_one_compile_per_shape(script):
    """After a first step, ragged rollouts and updates within the same buckets compile nothing."""
    steps = Steps(script)
    call = call_ids("add", a=3, b=4)
    ragged = [
        [[*call, *call], [FREE] * 7, [], [*call, FREE]],
        [[FREE] * 20, [*call, FREE, FREE, *call], [*call], [FREE]],
        [[*call, *call, FREE], [*call, *call], [FREE] * 3, [*call]],
    ]
    _, warm = steps(0, ragged[0])
    with compilations() as names:
        for i, rows in enumerate(ragged[1:]):
            _, batch = steps(2 * i, rows)
            assert (batch.completions.level.valid.sum(1) != warm.completions.level.valid.sum(1)).any()
    assert names == []
    assert int(steps.state.step) == 3


@pytest.mark.slow
def test_rule_6_twenty_ragged_steps_with_up_to_three_tool_turns(script):
    """Once every (T2, J) that `update_shapes` lists, and every response length with each size of the cache, was met,
    nothing compiles."""
    steps, rng = Steps(script), np.random.default_rng(0)
    texts = [" ".join(["What is"] * n) for n in (1, 6, 12)]
    widths = {response_bucket(len(helpers.conversation().response_ids([("echo", t)]))) for t in texts}
    assert len(widths) == 3

    def row(most):
        chosen = rng.choice(texts, rng.integers(most + 1), p=[0.6, 0.3, 0.1])
        turns = [call_ids("echo", text=str(text)) for text in chosen]
        return [*(token for turn in turns for token in turn), *[FREE] * rng.choice([0, 5, 60])]

    for text in texts:
        for before in ([], [0] * FIRST_SLOTS):
            steps(0, [[*before, *call_ids("echo", text=text)], [], [], []])
    for T2, J in update_shapes(BUDGET):
        steps.update([unsampled(i, tokens=min(T2 - 1, BUDGET), sampled=J - 1) for i in range(4)])
    met, turns = set(), set()
    with compilations() as names:
        for i in range(20):
            trajectories, batch = steps(2 * i, [row(most=i % 4) for _ in range(4)])
            met.add((batch.completions.targets.shape[1], batch.J))
            turns |= {len(t.calls) for t in trajectories}
    assert names == []
    assert turns == {0, 1, 2, 3} and len(met) >= 3


def unsampled(i, tokens, sampled):
    """A trajectory that no one sampled, of which the first tokens are learned."""
    mask = [t < sampled for t in range(tokens)]
    return helpers.trajectory(PROMPTS[i // 2], [1] * tokens, mask, [-1.0] * tokens)


class compilations:
    """Collects the names of what XLA compiles inside the block."""

    def __enter__(self):
        self.names, self.handler = [], logging.Handler()
        self.handler.emit = lambda record: self.keep(record.getMessage())
        self.logger = logging.getLogger("jax")
        self.logger.addHandler(self.handler)
        self.context = jax.log_compiles()
        self.context.__enter__()
        return self.names

    def keep(self, message):
        if message.startswith("Finished XLA compilation"):
            self.names.append(message)

    def __exit__(self, *error):
        self.context.__exit__(*error)
        self.logger.removeHandler(self.handler)


def test_compilations_are_counted():
    """The counter of rule 6 sees a compilation."""
    with compilations() as names:
        jax.jit(lambda x: x + 1)(np.ones(3))
    assert len(names) == 1


def test_rule_8_text_from_a_tool_is_text(script):
    """A tool's output that looks like the end of a turn and a call is neither."""
    row = run_one(script, call_ids("echo", text=CONTROL), text_ids("done"))
    assert texts(row, "tool") == [CONTROL]
    assert len(row.calls) == 1 and row.status is Status.ANSWERED
    given = [i for i, sampled in zip(row.completion_ids, row.sampled_mask, strict=True) if not sampled]
    conversation = helpers.conversation()
    control = Counter(i for i in given if i in conversation.control_ids.values())
    plain = conversation.response_ids([("echo", "harmless")])  # the template's own control tokens
    assert control == Counter(i for i in plain if i in conversation.control_ids.values())
    assert CONTROL in conversation.decode(given)


def test_every_token_passes_through_extend_once(script):
    """Preamble once, each prompt once, each completion token once; a row's last token is not needed."""
    call = call_ids("add", a=3, b=4)
    rows = [[*call, *call, FREE, FREE], [FREE] * 5, [*call, FREE], []]
    trajectories = run(script, rows)
    jax.effects_barrier()
    tree = helpers.tree()
    n = len(tree.preamble)
    shared = {(1, 0, position, token) for position, token in enumerate(tree.preamble)}
    for i, prompt in enumerate(PROMPTS[:2]):
        shared |= {(2, i, position, prompt[position]) for position in range(n, len(prompt) - 1)}
    assert script.shared == Counter(shared)
    assert script.fed == expected_fed(trajectories)


def expected_fed(trajectories):
    """(position, token) of what completions feed, however often another feeds the same."""
    expected = Counter()
    for t in trajectories:
        ids, start = [*t.prompt.ids, *t.completion_ids], len(t.prompt.ids) - 1
        expected.update(enumerate(ids[start:-1], start))
    return expected


def skewed_rows():
    """Sixteen rows of two or three turns; two are eight times as long, and every length differs by a few."""
    call = call_ids("add", a=3, b=4)
    short = [[*[FREE] * (i % 3), *call, *([*call, FREE] if i % 5 == 0 else [FREE]), END] for i in range(14)]
    long = [[*[0] * (175 + i), *call, *[0] * 20, FREE, END] for i in range(4)]
    return [*short[:7], long[0], *short[7:], long[3]]


def roll_out_skewed(script):
    script.load(skewed_rows())
    loop = helpers.tool_loop(script.sampler)
    return helpers.roll_out_weights(loop, helpers.weights(), PROMPTS[:2], (0, 1), generations=8)


def test_finished_rows_cost_little_and_change_nothing():
    """One row in eight is eight times as long: the same tokens with and without compaction, each fed once."""
    script = helpers.Script(compact=True)
    compact = roll_out_skewed(script)
    jax.effects_barrier()
    fed = script.fed
    with compilations() as names:
        roll_out_skewed(script)
    assert names == []
    whole = roll_out_skewed(helpers.Script())
    assert compact.work.wasted < 0.25
    assert whole.work.wasted > 0.6
    assert {len(t.calls) for t in compact.trajectories} == {1, 2}
    for a, b in zip(compact.trajectories, whole.trajectories, strict=True):
        assert (a.completion_ids, a.messages, a.status) == (b.completion_ids, b.messages, b.status)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert fed == expected_fed(compact.trajectories)


@pytest.mark.parametrize(("delay", "rounds"), [(0, 0), (8, 1), (64, 2)])
def test_a_slow_tools_result_is_fed_so_many_steps_later(script, delay, rounds):
    """The tool of row 0 ends once decode has gone on for as many rounds with rows 2 and 3 as its delay asks for,
    though their turns take 50 and 60 steps; were it waited for any sooner, it would time out."""
    events, decode_goes_on = [], threading.Event()

    def nap(seconds: float) -> str:
        return "decode went on" if not rounds or decode_goes_on.wait(seconds) else "decode waited"

    def decode(*args, **rows):
        events.append("decode")
        if "submit" in events and events[events.index("submit") :].count("decode") == rounds:
            decode_goes_on.set()
        return script.sampler.decode(*args, **rows)

    def append(*args, **rows):
        events.append("feed")
        return script.sampler.append(*args, **rows)

    script.load([call_ids("nap", seconds=5.0), [], [0] * 60, [0] * 50])
    runner = ToolRunner(Toolbox({"nap": nap}, SCHEMAS, "a test"), "inline", Limits(seconds=10))
    sampler = dataclasses.replace(script.sampler, decode=decode, append=append)
    loop = dataclasses.replace(helpers.tool_loop(sampler), runner=runner, delays={"nap": delay})
    with runner:
        submit = runner.submit
        runner.submit = lambda *args: events.append("submit") or submit(*args)
        row = helpers.rollout(loop, PROMPTS[:2], generations=2)[0]
    assert texts(row, "tool") == ["decode went on"]
    after = events[events.index("submit") + 1 :]
    assert after[: rounds + 1] == ["decode"] * rounds + ["feed"]


def test_each_completion_takes_its_turns_as_it_would_alone():
    """Four conversations with tools at once, their turns interleaved and one tool late, and one after the other."""
    call, rows = call_ids("add", a=3, b=4), [[FREE] * 5, [FREE] * 25, [], [FREE] * 9]
    rows = [[*row, *call, *row, *call_ids("echo", text="seven"), *row] for row in rows]
    prompts = [PROMPTS[i] for i in (0, 1, 2, 0)]

    def rolled(script, chosen, **settings):
        script.load([rows[i] for i in chosen])
        loop = helpers.tool_loop(script.sampler, **settings)
        return helpers.rollout(loop, [prompts[i] for i in chosen], chosen)

    together = rolled(helpers.Script(), range(4), delays={"echo": 16})
    one = helpers.Script()
    for i, row in enumerate(together):
        (alone,) = rolled(one, [i])
        assert (row.completion_ids, row.messages, row.status) == (
            alone.completion_ids,
            alone.messages,
            alone.status,
        )
        np.testing.assert_allclose(row.logprobs, alone.logprobs, atol=1e-4)
    assert [len(row.calls) for row in together] == [2] * 4


def test_several_calls_of_a_turn_run_in_order(script):
    calls = [("add", {"a": 1, "b": 2}), ("echo", {"text": "two"}), ("multiply", {"a": 3, "b": 4})]
    turn = [i for name, arguments in calls for i in [*call_ids(name, **arguments)[:-1], *spelled("\n")]]
    row = run_one(script, [*turn, END], text_ids("ok"))
    assert [(call.name, call.arguments) for call, _ in row.calls] == calls
    assert [m.get("name") for m in row.messages] == [None, "add", "echo", "multiply", None]
    assert texts(row, "tool") == ["Sum: 3", "two", "Product: 12"]
    response = helpers.conversation().response_ids(
        [("add", "Sum: 3"), ("echo", "two"), ("multiply", "Product: 12")]
    )
    n = len(turn) + 1
    assert row.completion_ids[n : n + len(response)] == response


def test_the_runner_is_told_whose_call_it_is(script):
    """Tools with state answer each row from that row's own objects."""
    loop, told = helpers.tool_loop(script.sampler), []
    submit = loop.runner.submit
    loop.runner.submit = lambda calls, rows: told.append((len(calls), rows)) or submit(calls, rows)
    two_calls = [*call_ids("echo", text="a")[:-1], *call_ids("echo", text="b")]
    script.load([two_calls, [], call_ids("echo", text="c")])
    helpers.rollout(loop, PROMPTS[:2], generations=2)
    assert sorted(told[:2]) == [(1, [2]), (2, [0, 0])]


def test_a_row_may_call_only_the_tools_that_its_prompt_shows(script):
    """Any other is unknown to it, and the reason names those that it has."""
    turns = [i for turn in (call_ids("add", a=1, b=2), text_ids("done")) for i in turn]
    script.load([turns] * 4)
    loop = helpers.tool_loop(script.sampler, malformed_feedback=True)
    shown = [SCHEMAS, [s for s in SCHEMAS if s["function"]["name"] in ("multiply", "echo")]]
    policy = make_policy(loop, loop.sampler.export(helpers.weights()))
    prompts = [helpers.prompt(PROMPTS[i], i, schemas) for i, schemas in enumerate(shown)]
    rows = roll_out(loop, policy, prompts, generations=2).trajectories
    assert [len(row.calls) for row in rows] == [1, 1, 0, 0]
    assert texts(rows[1], "tool") == ["Sum: 3"]
    reason = "Error: the tool call does not parse: unknown tool: 'add'; try one of multiply, echo"
    assert texts(rows[2], "tool") == [reason]


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_row_that_still_calls_after_the_limit_ends_there(script, limit):
    row = run_one(script, *[call_ids("add", a=i, b=1) for i in range(3)], max_iterations=limit)
    assert row.status is Status.TOOL_LIMIT
    assert texts(row, "tool") == [f"Sum: {i + 1}" for i in range(limit)]
    assert len(row.messages) == 2 * limit + 1
    assert row.messages[-1]["tool_calls"][0]["function"]["arguments"] == {"a": limit, "b": 1}
    assert row.completion_ids[-1] == END and row.sampled_mask[-1]


def test_a_row_that_answers_at_the_limit_is_answered(script):
    row = run_one(script, call_ids("add", a=1, b=1), text_ids("2"), max_iterations=1)
    assert row.status is Status.ANSWERED


def test_without_a_limit_the_budget_ends_the_calls(script):
    row = run_one(script, *[call_ids("add", a=1, b=1)] * 20)
    assert row.status in (Status.OVERLONG, Status.OVERLONG_TOOL_RESPONSE)
    assert len(row.calls) >= 2
    assert len(row.completion_ids) <= BUDGET


def test_a_row_may_end_at_its_first_tool_results(script):
    """What the tools said is recorded, and nothing is fed or sampled after the calls."""
    calls = helpers.conversation().assistant_ids("", [ToolCall("add", {"a": 1, "b": 2})] * 2)
    row = run_one(script, calls, text_ids("3"), stop_after_tools=True)
    assert (row.status, row.completion_ids, row.sampled_mask[-1]) == (Status.TOOLS_DONE, calls, True)
    assert texts(row, "tool") == [result.text for _, result in row.calls] == ["Sum: 3"] * 2
    first = text_ids('<tool_call>{"name": "add"')
    settings = {"stop_after_tools": True, "malformed_feedback": True}
    row = run_one(script, first, call_ids("add", a=1, b=2), text_ids("3"), **settings)
    assert (row.status, len(row.messages)) == (Status.TOOLS_DONE, 4)  # the feedback was no result


def test_the_call_of_a_final_tool_is_the_answer(script):
    settings = {"final_tools": {"echo": "text"}, "max_iterations": 1}
    add, final = call_ids("add", a=1, b=2), call_ids("echo", "So:", text="It is 3.")
    row = run_one(script, add, final, text_ids("more"), **settings)
    assert row.status is Status.ANSWERED
    assert row.completion_ids[-len(final) :] == final and row.sampled_mask[-1]
    assert [(m["role"], m["content"]) for m in row.messages[1:]] == [
        ("tool", "Sum: 3"),
        ("assistant", "It is 3."),
    ]
    assert row.messages[-1]["tool_calls"][0]["function"]["name"] == "echo"
    assert [call.name for call, _ in row.calls] == ["add"]
    assert trajectory_grounded(row)


def test_a_final_call_that_fails_is_a_call_as_any_other(script):
    settings = {"final_tools": {"fail": "why"}, "max_iterations": 1}
    row = run_one(script, call_ids("fail", why="no"), text_ids("Sorry."), **settings)
    assert row.status is Status.TOOL_ERROR and texts(row, "tool")[0].startswith("Error: ")
    row = run_one(script, *[call_ids("fail", why="no")] * 4, **settings)
    assert (row.status, len(row.calls)) == (Status.TOOL_LIMIT, 2)


def test_a_refused_final_call_is_no_result(script):
    """Rewards and figures look at what the other tools said."""
    settings = {"final_tools": {"echo": "text"}}
    add, refused = call_ids("add", a=1, b=2), call_ids("echo")  # its argument is missing
    row = run_one(script, add, refused, call_ids("echo", text="It is 3."), **settings)
    assert [m.get("final") for m in row.messages if m["role"] == "tool"] == [None, True]
    assert row.status is Status.ANSWERED and trajectory_grounded(row)
    answer = dataclasses.replace(row.prompt.example, answer="Sum: 3")
    assert is_exact(dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, example=answer)))
    assert [call.name for call, _ in row.calls] == ["add", "echo"]  # for penalties


def test_the_fault_of_a_call_next_to_a_final_one_is_its_own(script):
    final, failed = call_ids("echo", text="No.")[:-1], call_ids("fail", why="no")
    row = run_one(script, final + failed, final_tools={"echo": "text"})
    (found,) = faults(row, helpers.conversation())
    assert "fail" in helpers.conversation().decode(row.completion_ids[found.start : found.stop])


def test_malformed_call_ends_the_row(script):
    turn = text_ids('<tool_call>\n{"name": "add", "arguments": {"a": 1')
    row = run_one(script, turn, text_ids("never reached"))
    assert row.status is Status.MALFORMED_CALL
    assert row.completion_ids == turn and row.calls == []
    assert row.messages == [{"role": "assistant", "content": helpers.conversation().decode(turn)}]


def test_malformed_call_gets_feedback_where_asked(script):
    malformed = text_ids('<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>')
    turns = (malformed, call_ids("add", a=1, b=2), text_ids("3"))
    row = run_one(script, *turns, malformed_feedback=True)
    assert row.status is Status.ANSWERED
    assert [m.get("name") for m in row.messages] == [None, "tool_call_parser", None, "add", None]
    feedback, result = texts(row, "tool")
    assert feedback.startswith("Error: the tool call does not parse: arguments not an object")
    assert result == "Sum: 3"
    again = run_one(script, *turns, malformed_feedback=True, max_iterations=0)
    assert again.status is Status.MALFORMED_CALL and again.completion_ids == malformed


def test_a_turn_cut_off_by_the_budget_is_overlong(script):
    endless = [0] * (BUDGET + 50)
    row = run_one(script, endless)
    assert row.status is Status.OVERLONG
    assert row.completion_ids == [0] * BUDGET and all(row.sampled_mask)
    assert [m["role"] for m in row.messages] == ["assistant"]


def test_a_turn_that_reaches_its_own_limit_is_overlong(script):
    """The limit is of each turn, not of the tool response between them, and a turn that ends on it is whole."""
    call = call_ids("add", a=1, b=2)
    limit = len(call)
    row = run_one(script, call, [*[0] * limit, END], max_turn=limit)
    assert row.status is Status.OVERLONG and texts(row, "tool") == ["Sum: 3"]
    assert row.completion_ids[-limit:] == [0] * limit and len(row.completion_ids) < BUDGET
    assert sum(row.sampled_mask) == 2 * limit
    assert run_one(script, call, [*[0] * (limit - 1), END], max_turn=limit).status is Status.ANSWERED


def test_a_turn_that_ends_on_the_budgets_last_token_is_whole(script):
    row = run_one(script, [*[0] * (BUDGET - 1), END])
    assert row.status is Status.ANSWERED and len(row.completion_ids) == BUDGET


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_tool_response_must_leave_room_for_a_token(script, spare):
    """A response that does not fit is not fed and not part of the ids; the rewards still see it."""
    call = call_ids("add", a=1, b=2)
    response = helpers.conversation().response_ids([("add", "Sum: 3")])
    filler = [0] * (BUDGET - len(call) - len(response) - spare)
    row = run_one(script, [*filler, *call], [0])
    assert texts(row, "tool") == ["Sum: 3"]
    if spare < 1:
        assert row.status is Status.OVERLONG_TOOL_RESPONSE
        assert row.completion_ids == [*filler, *call]
    else:
        assert row.status is Status.OVERLONG
        assert row.completion_ids == [*filler, *call, *response, 0]


@pytest.mark.parametrize(
    ("tool", "arguments", "status", "outcome"),
    [
        ("fail", {"why": "no"}, Status.TOOL_ERROR, Outcome.ERROR),
        ("add", {"a": 1}, Status.TOOL_ERROR, Outcome.ERROR),
        ("nap", {"seconds": 1.0}, Status.TOOL_TIMEOUT, Outcome.TIMEOUT),
    ],
)
def test_an_answer_after_a_failed_call_says_how_it_failed(script, tool, arguments, status, outcome):
    row = run_one(script, call_ids(tool, **arguments), text_ids("ok"))
    assert row.status is status
    assert row.calls[-1][1].outcome is outcome
    assert texts(row, "tool")[0].startswith("Error: ")


def test_only_the_last_call_decides_the_status(script):
    row = run_one(script, call_ids("fail", why="no"), call_ids("add", a=1, b=2), text_ids("3"))
    assert row.status is Status.ANSWERED
    assert [result.outcome for _, result in row.calls] == [Outcome.ERROR, Outcome.OK]


def test_finished_rows_of_a_group_stay_as_they_are(script):
    """Row 0 ends at once; its neighbour's three tool turns change nothing of it."""
    call = call_ids("add", a=1, b=2)
    short = [FREE, FREE, FREE]
    alone = run(script, [short])[0]
    together = run(script, [short, [*call, *call, *call, FREE]])
    assert alone == together[0]
    assert len(together[1].calls) == 3


def test_what_only_fills_up_the_batch_gives_no_trajectory(script):
    script.load([[0, 0], [0], [0, 0], [0]])
    loop = helpers.tool_loop(script.sampler)
    rows = helpers.rollout(loop, [PROMPTS[0], None], generations=2)
    assert [row.completion_ids for row in rows] == [[0, 0, END], [0, END]]


def test_progress_is_reported_at_every_return_of_decode(script):
    """What has ended since, what still runs, and how many turns were answered; also within a long turn."""
    call = call_ids("add", a=1, b=2)
    script.load([[*call, *call], [call[0]], [], [*[0] * MAX_STEPS, *call]])
    finished, shown = [], []

    def on_progress(count, **fields):
        finished.append(count)
        shown.append(fields)

    loop = helpers.tool_loop(script.sampler)
    helpers.rollout(loop, PROMPTS[:2], generations=2, on_progress=on_progress)
    assert [count for count in finished if count] == [1, 1, 1, 1]
    running = 4 - np.cumsum(finished)
    assert [fields["running"] for fields in shown] == running.tolist() and running[-1] == 0
    answered = [fields["tool_turns"] for fields in shown]
    assert answered == sorted(answered) and set(answered) == {0, 1, 2, 3}
    assert all(fields["tokens_per_s"] > 0 for fields in shown)


def test_a_run_that_is_to_stop_begins_no_rollout(script):
    assert roll_out(helpers.tool_loop(script.sampler), None, [None], stop=lambda: True) == Rollout(
        [], interrupted=True
    )


def test_without_a_shared_preamble_the_rollout_is_the_same(script):
    """T0 = 0: whole prompts lie in their own level; tokens and log-probabilities stay."""
    rows = [[*call_ids("add", a=3, b=4), FREE, FREE], [FREE] * 4]
    base = run(script, rows)
    tree = helpers.make_tree([PROMPTS[0], PROMPTS[1], [0, 1]], BUDGET)
    assert tree.T0 == 0
    script.load(rows)
    loop = dataclasses.replace(helpers.tool_loop(script.sampler), tree=tree)
    flat = helpers.rollout(loop, PROMPTS[:2], generations=2)
    for a, b in zip(base, flat, strict=True):
        assert a.completion_ids == b.completion_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
