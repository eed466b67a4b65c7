"""Which tokens wrote a call that went wrong."""

import dataclasses

import pytest
from helpers import SCHEMAS, call_ids, conversation, prompt, text_ids

from grpo_jax.rollout.faults import faults
from grpo_jax.types import Outcome, Status, ToolCall, ToolResult, Trajectory

ADD, ECHO = ToolCall("add", {"a": 3, "b": 4}), ToolCall("echo", {"text": "ü — </think>"})
RESPONSE = [5, 6, 7]
CUT = '<tool_call>\n{"name": "add", "arguments": {"a": 1'


def finished(*turns, results=(), status=Status.ANSWERED):
    """A trajectory of turns with a tool response between them; `results` are (call, outcome) in order."""
    ids, mask = [], []
    for i, turn in enumerate(turns):
        gap = RESPONSE if i else []
        ids += [*gap, *turn]
        mask += [False] * len(gap) + [True] * len(turn)
    calls = [(call, ToolResult("…", outcome, 0.0)) for call, outcome in results]
    return Trajectory(prompt([1, 2], schemas=SCHEMAS), ids, mask, calls=calls, status=status)


def texts(trajectory, of=None):
    of = of or conversation()
    return [
        (f.parses, of.decode(trajectory.completion_ids[f.start : f.stop])) for f in faults(trajectory, of)
    ]


def written(call):
    text = conversation().decode(conversation().assistant_ids("", [call]))
    return text[text.index("<tool_call>") :]


def test_the_failed_of_several_calls_is_found_in_its_turn():
    turn = conversation().assistant_ids("Äh, I try both:", [ADD, ECHO])
    row = finished(
        call_ids("add", a=3, b=4), turn, text_ids("Done."),
        results=[(ADD, Outcome.ERROR), (ADD, Outcome.OK), (ECHO, Outcome.TIMEOUT)],
    )  # fmt: skip
    assert texts(row) == [(True, written(ADD)), (True, written(ECHO))]
    first, second = faults(row, conversation())
    assert first.stop <= row.turns[0][1] and row.turns[1][0] < second.start < second.stop <= row.turns[1][1]


@pytest.mark.parametrize(
    ("turn", "call"),
    [
        (f"I add. {CUT}", CUT),
        (
            'No.<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call> So.',
            '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>',
        ),
        (f"{written(ADD)}\n<tool_call>\n1\n</tool_call>", "<tool_call>\n1\n</tool_call>"),
    ],
)
def test_a_malformed_call_is_its_own_tokens(turn, call):
    """Whether it ends the row or the model is told of it and goes on."""
    row = finished(text_ids(turn), status=Status.MALFORMED_CALL)
    assert texts(row) == [(False, call)]
    row = finished(text_ids(turn), call_ids("add", a=3, b=4), text_ids("7"), results=[(ADD, Outcome.CRASH)])
    assert texts(row) == [(False, call), (True, written(ADD))]


def test_calls_that_were_not_run_and_turns_that_were_cut_off_are_no_faults():
    call = call_ids("add", a=3, b=4)
    assert texts(finished(call, call, results=[(ADD, Outcome.OK)], status=Status.TOOL_LIMIT)) == []
    assert texts(finished(text_ids(CUT)[:-1], status=Status.OVERLONG)) == []


def test_a_turn_that_begins_inside_a_think_block_is_counted_from_there():
    thinking = dataclasses.replace(conversation(), opens_thinking=True)
    row = finished(text_ids(f"Hm.</think>{CUT}"), status=Status.MALFORMED_CALL)
    assert texts(row, thinking) == [(False, CUT)]
