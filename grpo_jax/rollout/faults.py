"""Which tokens wrote the calls that went wrong: for penalties on them alone."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from grpo_jax.rollout.conversation import Conversation
from grpo_jax.types import Fault, Outcome, Status, Trajectory


def faults(trajectory: Trajectory, conversation: Conversation) -> list[Fault]:
    """The calls of a finished trajectory that do not parse, or whose result is not `ok`.

    A turn that a budget cut off is left out: its status says what it is. So are calls that were not run.
    """
    found, results = [], list(trajectory.calls)
    for start, stop in trajectory.turns:
        if trajectory.status is Status.OVERLONG and stop == len(trajectory.completion_ids):
            break
        ids = trajectory.completion_ids[start:stop]
        turn = conversation.parse(ids, trajectory.prompt.schemas)
        if turn.error:
            wrong = turn.spans
        else:
            wrong = []
            for call, span in zip(turn.calls, turn.spans, strict=True):
                if (
                    results and results[0][0] == call
                ):  # the last turn's calls, and a final one, have no result
                    _, result = results.pop(0)
                    wrong += [span] if result.outcome is not Outcome.OK else []
        for span in wrong:
            first, last = _tokens_of(span, ids, conversation)
            found.append(Fault(not turn.error, start + first, start + last))
    return found


def _tokens_of(span: tuple[int, int], ids: Sequence[int], conversation: Conversation) -> tuple[int, int]:
    """The tokens of a turn that write characters `span` of the text that `parse` reads."""
    opened = len("<think>") * conversation.opens_thinking

    def written(n: int) -> int:
        return opened + len(conversation.decode(ids[:n]))

    first = bisect.bisect_right(range(len(ids)), span[0], key=lambda n: written(n + 1))
    last = bisect.bisect_left(range(len(ids)), span[1], key=lambda n: written(n + 1)) + 1
    return first, min(last, len(ids))
