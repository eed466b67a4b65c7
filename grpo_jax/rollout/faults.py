"""Which tokens wrote the calls that went wrong: for penalties on them alone."""

from __future__ import annotations

import bisect

from grpo_jax.rollout.conversation import Conversation
from grpo_jax.types import Fault, Outcome, Status, Trajectory


def faults(trajectory: Trajectory, conversation: Conversation) -> list[Fault]:
    """The calls of a finished trajectory that do not parse, or whose result is not `ok`.

    A turn that a budget cut off is left out: its status says what it is. So are calls that were not run.
    """
    found, results = [], list(trajectory.calls)
    opened = len("<think>") * conversation.opens_thinking  # what `parse` reads before the first token
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
                # the last turn's calls, and a final one, have no result
                if results and results[0][0] == call:
                    _, result = results.pop(0)
                    wrong += [span] if result.outcome is not Outcome.OK else []

        def written(i: int, ids=ids) -> int:
            """Characters of the turn's text up to the end of token i."""
            return opened + len(conversation.decode(ids[: i + 1]))

        for begin, end in wrong:
            first = bisect.bisect_right(range(len(ids)), begin, key=written)
            last = bisect.bisect_left(range(len(ids)), end, key=written) + 1
            found.append(Fault(not turn.error, start + first, start + min(last, len(ids))))
    return found
