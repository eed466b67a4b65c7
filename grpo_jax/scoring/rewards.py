"""Loads reward functions, calls them on a batch, and checks what they return.

A reward function is the user's code: any fault of it becomes a `RewardError` that
names the function and the row.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from grpo_jax.files import plain
from grpo_jax.scoring.event_loop import EventLoop
from grpo_jax.scoring.grounding import is_grounded
from grpo_jax.scoring.metrics import is_run_metric
from grpo_jax.text import shorten
from grpo_jax.tools.process_state import users_code
from grpo_jax.tools.user_code import error_text, import_file
from grpo_jax.types import BUILT_IN_REWARDS, Message, Status, tool_results

_log = logging.getLogger(__name__)
_loop = EventLoop()
# What the functions print. One object for the lifetime of the process, because a log handler that a library
# creates in the first call keeps writing to what was standard error then.
_printed = io.StringIO()

# What every row of rollouts/ holds; a column of these names that a reward logs is called logged/NAME.
ROW_COLUMNS = frozenset(("prompt", "messages", "answer", "rewards", "status", "advantage"))


class RewardError(RuntimeError):
    """A reward function raised or returned something unusable; `__cause__` is its own exception."""


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A loaded reward.

    Args:
        name: the file's name without `.py`, or the built-in's; metrics are called rewards/NAME/….
        source: the file, or "built-in".
    """

    name: str
    function: Callable
    source: str

    def __str__(self) -> str:
        return f"{self.name!r} ({self.source})"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainerState(Mapping):
    """The progress of the run, for rewards that depend on it; each field is an attribute and an item.

    Args:
        global_step: updates done.
        max_steps: updates of the whole run.
        epoch: passes over the data done, a fraction included.
        num_train_epochs: passes of the whole run.
    """

    global_step: int
    max_steps: int
    epoch: float
    num_train_epochs: float

    def __getitem__(self, name: str) -> Any:
        if name not in iter(self):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return len(dataclasses.fields(self))


@dataclasses.dataclass(frozen=True)
class RewardOutcome:
    """What the rewards say about a batch.

    Args:
        values: [B, n_rewards] float64; NaN where a reward does not apply, and for one that scores turns.
        metrics: name → mean of the values given to `log_metric`; logged/NAME for a name of the run's own.
        extras: column → the B values given to `log_extra`, as JSON has them; REWARD/COLUMN for a column that
            several functions log, logged/COLUMN for one of `ROW_COLUMNS`.
        turns: number of a function that scores turns → for each of the B rows one value per turn of the model,
            NaN where it does not apply.
    """

    values: np.ndarray
    metrics: dict[str, float]
    extras: dict[str, list]
    turns: dict[int, list[list[float]]] = dataclasses.field(default_factory=dict)

    @property
    def means(self) -> np.ndarray:
        """`values` with a row's mean over its turns for functions that score turns: for logs."""
        if not self.turns:
            return self.values
        values = self.values.copy()
        for k, rows in self.turns.items():
            there = [[value for value in row if not math.isnan(value)] for row in rows]
            values[:, k] = [sum(row) / len(row) if row else math.nan for row in there]
        return values

    def of_rows(self, rows: Sequence[int] | np.ndarray) -> RewardOutcome:
        """What the rewards say about some of the rows."""
        extras = {column: [values[i] for i in rows] for column, values in self.extras.items()}
        turns = {k: [values[i] for i in rows] for k, values in self.turns.items()}
        return RewardOutcome(self.values[rows], self.metrics, extras, turns)

    def turn_rewards(self, weights: Sequence[float]) -> list[list[float]] | None:
        """For each row Σ_k w_k · R_k of each turn, over the k that apply; None when no function scores turns."""
        if not self.turns:
            return None
        by_row = zip(*self.turns.values(), strict=True)
        used = [weights[k] for k in self.turns]
        return [
            [
                math.nan if all(map(math.isnan, turn)) else np.nansum(np.multiply(used, turn)).item()
                for turn in itertools.zip_longest(*functions, fillvalue=math.nan)  # [] where a host had none
            ]
            for functions in by_row
        ]


def joined(outcomes: Sequence[RewardOutcome]) -> RewardOutcome:
    """The outcome of a batch whose parts were scored separately; a metric is the mean of the parts' means.

    Args:
        outcomes: one per part, in order; a column that a part lacks is None in its rows.
    """
    metrics = {
        name: [o.metrics[name] for o in outcomes if name in o.metrics] for o in outcomes for name in o.metrics
    }
    columns = list(dict.fromkeys(column for o in outcomes for column in o.extras))
    scored = dict.fromkeys(k for o in outcomes for k in o.turns)
    turns = {k: [row for o in outcomes for row in o.turns.get(k, [[]] * len(o.values))] for k in scored}
    return RewardOutcome(
        np.concatenate([o.values for o in outcomes]),
        {name: sum(means) / len(means) for name, means in metrics.items()},
        {c: [v for o in outcomes for v in o.extras.get(c, [None] * len(o.values))] for c in columns},
        turns,
    )


def same_answer(text: str, answer: str) -> bool:
    """Two answers are equal except for case and outer or repeated whitespace."""
    return text.casefold().split() == answer.casefold().split()


def accuracy(completions: Sequence[Sequence[Message]], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """Built-in reward: did the last tool response give the answer?

    | completion | reward |
    |---|---|
    | no tool call | 0.0 |
    | a tool call, and the last tool response is not the answer | 0.1 |
    | the last tool response is the answer (`same_answer`) | 1.0 |

    Args:
        completions: [B] the messages after each prompt.
        answer: [B] what the tool should return.

    Returns:
        [B] rewards.
    """
    rewards = []
    for messages, expected in zip(completions, answer, strict=True):
        results = tool_results(messages)
        if results:
            rewards.append(1.0 if same_answer(results[-1][1], expected) else 0.1)
        else:  # a call without a response: the row's budget ended before it
            rewards.append(0.1 if any(m.get("tool_calls") for m in messages) else 0.0)
    return rewards


def grounded(
    completions: Sequence[Sequence[Message]],
    statuses: Sequence[str],
    must_state: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Built-in reward: does the final text state what the tool said?

    Args:
        completions: [B] the messages after each prompt.
        statuses: [B] how each ended.
        must_state: [B] tools whose results must be stated; None for the last result of any tool.

    Returns:
        [B] 1.0 where the model ended the conversation and its last message is grounded (`is_grounded`), 0.0
        where not, None where no tool has answered.
    """
    named = must_state or [None] * len(completions)
    stated = map(is_grounded, completions, named)
    return [
        None if states is None else float(states and Status(status).closed)
        for states, status in zip(stated, statuses, strict=True)
    ]


BUILT_IN: dict[str, Callable] = dict(zip(BUILT_IN_REWARDS, (accuracy, grounded), strict=True))


def load_rewards(files: Sequence[str] | None, names: Sequence[str] | None) -> list[RewardFunction]:
    """Load `reward_func` from each file, else the built-ins of that name, else `accuracy`.

    Args:
        files: Python files exporting `reward_func`, and names of built-ins; when given, `names` is not read.

    Raises:
        ValueError: a missing or failing file, no `reward_func` in it or one that is not callable,
            an unknown built-in, or two rewards of one name.
    """
    return _distinct(
        [_built_in(f) if f in BUILT_IN else _from_file(f) for f in files]
        if files
        else [_built_in(n) for n in names or ["accuracy"]]
    )


def rewards_of(given: Callable | str | Sequence[Callable | str]) -> list[RewardFunction]:
    """Rewards given in Python: functions, and names of built-in ones; one alone or several.

    Raises:
        TypeError: something else.
        ValueError: no reward, an unknown built-in, or two of one name.
    """
    several = [given] if isinstance(given, str) or callable(given) else list(given)
    if not several:
        raise ValueError("reward_funcs needs at least one reward, got none")
    rewards = []
    for one in several:
        if isinstance(one, str):
            rewards.append(_built_in(one))
            continue
        if not callable(one):
            raise TypeError(
                f"reward_func must be callable, got {_short(one)}; give a function or the name of a built-in "
                f"reward ({', '.join(BUILT_IN)})"
            )
        name = getattr(one, "__name__", type(one).__name__)
        rewards.append(RewardFunction(name, one, f"given in Python, {getattr(one, '__module__', '?')}"))
    return _distinct(rewards)


def _distinct(rewards: list[RewardFunction]) -> list[RewardFunction]:
    for i, reward in enumerate(rewards):
        for other in rewards[:i]:
            if other.name == reward.name:
                raise ValueError(
                    f"two reward functions are named {reward.name!r} ({other.source} and {reward.source}); "
                    "metrics would mix them: rename one or drop one"
                )
    return rewards


def call_rewards(
    rewards: Sequence[RewardFunction],
    *,
    completions: Sequence[Sequence[Message]],
    answer: Sequence[str],
    prompts: Sequence[Sequence[Message]],
    completion_ids: Sequence[Sequence[int]],
    trainer_state: Any,
    columns: Mapping[str, Sequence],
) -> RewardOutcome:
    """Score a batch with every reward function; async ones run concurrently.

    A function without `**kwargs` gets only the keywords that it names. What the functions print
    is logged at INFO when all have returned, so that it does not break a progress bar. All calls of a
    process share one event loop, see `EventLoop`.

    Args:
        completions: [B] the messages after each prompt.
        answer: [B].
        prompts: [B] each prompt as messages.
        completion_ids: [B] token ids after each prompt.
        trainer_state: passed on unchanged, usually a `TrainerState`.
        columns: the data set's other columns, and how each completion ended, [B] values each.

    Raises:
        RewardError: a function raises, lacks a keyword, or returns or logs anything other than one finite
            number or None per row.
    """
    batch = {
        **columns,
        "completions": completions,
        "answer": answer,
        "prompts": prompts,
        "completion_ids": completion_ids,
    }
    logs = [_Log() for _ in rewards]
    try:
        with contextlib.redirect_stdout(_printed), contextlib.redirect_stderr(_printed):
            results = _run(
                [_bound(r, batch, trainer_state, log) for r, log in zip(rewards, logs, strict=True)]
            )
            for reward, result in zip(rewards, results, strict=True):
                if isinstance(result, _Raised):
                    raise _failure(reward, result.error, batch, trainer_state) from result.error
    finally:
        for line in _printed.getvalue().splitlines():
            _log.info("reward function prints: %s", line)
        _forget_printed(0)  # including what a handler that writes there made of these records
    # --- what they returned: one number per row, or a list with one number per turn of the model
    n = len(completions)
    values, turns = np.full((n, len(rewards)), np.nan), {}
    numbers = [sum(message["role"] == "assistant" for message in messages) for messages in completions]
    for k, (reward, result) in enumerate(zip(rewards, results, strict=True)):
        if isinstance(result, list | tuple) and any(isinstance(row, list | tuple) for row in result):
            turns[k] = _checked_turns(reward, result, numbers)
        else:
            values[:, k] = _checked(reward, result, n)
    # --- what they logged: the mean of a metric is over all functions that log it
    extras = _columns(rewards, logs, n)
    extras |= {f"{rewards[k].name}/turns": plain(list(results[k])) for k in turns}
    means = {}
    for name in dict.fromkeys(name for log in logs for name in log.metrics):
        logged = [value for log in logs for value in log.metrics.get(name, ())]
        means[_own_name("log_metric", name, is_run_metric(name))] = sum(logged) / len(logged)
    return RewardOutcome(values, means, extras, turns)


# Loading


def _built_in(name: str) -> RewardFunction:
    if name not in BUILT_IN:
        raise ValueError(
            f"Unknown reward function: {name}. Available: {', '.join(BUILT_IN)}. "
            "For your own, set reward_fn to a Python file that exports reward_func."
        )
    return RewardFunction(name, BUILT_IN[name], "built-in")


def _from_file(file: str) -> RewardFunction:
    with _loop.in_this_thread():
        module, path = import_file(file, "reward_fn")
    found = vars(module).get("reward_func")
    if found is None:
        raise ValueError(f"No reward_func found in {file}; end it with reward_func = your_function")
    if not callable(found):
        raise ValueError(
            f"reward_func must be callable, got {found!r} in {file}; end it with reward_func = your_function"
        )
    return RewardFunction(path.stem, found, str(file))


# Calling


@dataclasses.dataclass(frozen=True)
class _Raised:
    error: BaseException


class _Log:
    """Collects what one function gives to `log_metric` and `log_extra`."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list] = {}

    def metric(self, name: str, value: Any) -> None:
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise ValueError(f"log_metric({name!r}, …) takes a finite number, got {_short(value)}")
        self.metrics.setdefault(str(name), []).append(number)

    def extra(self, column: str, values: Iterable) -> None:
        if isinstance(values, str | bytes | Mapping):
            raise TypeError(
                f"log_extra({column!r}, …) takes a list with one value per row, got {_short(values)}"
            )
        self.extras.setdefault(str(column), []).extend(values)


def _columns(rewards: Sequence[RewardFunction], logs: Sequence[_Log], n: int) -> dict[str, list]:
    columns = {}
    for reward, log in zip(rewards, logs, strict=True):
        for column, values in log.extras.items():
            if len(values) != n:
                raise RewardError(
                    f"log_extra({column!r}, …) of reward function {reward} got {len(values)} values for {n} "
                    "completions"
                )
            shared = sum(column in other.extras for other in logs) > 1
            name = _own_name("log_extra", column, column in ROW_COLUMNS)
            columns[f"{reward.name}/{column}" if shared else name] = plain(values)
    return columns


@functools.cache  # warns once
def _own_name(function: str, name: str, taken: bool) -> str:
    """The name under which a reward's logged value is written, so that it does not replace the run's own."""
    if not taken:
        return name
    _log.warning(
        f"{function}({name!r}, …): the run itself writes {name!r}; the reward's value is logged as 'logged/{name}'"
    )
    return f"logged/{name}"


def _bound(
    reward: RewardFunction, batch: Mapping[str, Sequence], trainer_state: Any, log: _Log
) -> functools.partial:
    """The function with the keywords that it takes, copied: what it changes in them reaches no other row or reward."""
    keywords = {
        **batch,
        "trainer_state": trainer_state,
        "log_metric": log.metric,
        "log_extra": log.extra,
    }
    if isinstance(reward.function, functools.partial):  # what it binds is not for a column to change
        keywords = {name: value for name, value in keywords.items() if name not in reward.function.keywords}
    parameters = inspect.signature(reward.function).parameters.values()
    for p in parameters:
        is_variadic = p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if p.name not in keywords and p.default is p.empty and not is_variadic:
            raise RewardError(
                f"reward function {reward} needs {p.name!r}, which is not a column of the data; "
                f"available: {', '.join(keywords)}"
            )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        keywords = {p.name: keywords[p.name] for p in parameters if p.name in keywords}
    if reward.source != "built-in":
        keywords = {name: _copied(value) for name, value in keywords.items()}
    return functools.partial(reward.function, **keywords)


def _copied(value: Any) -> Any:
    """Lists and objects anew, with all that is in them; rows of one prompt share what its columns hold."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) if isinstance(inner, dict | list) else inner for inner in value]
    return value


def _run(calls: Sequence[functools.partial]) -> list[Any]:
    """What each call returns, or `_Raised`; plain ones in order, then all awaitables together."""
    results = []
    with _loop.in_this_thread():
        for call in calls:
            asyncio.set_event_loop(None)  # back to the one loop, where the function before set another
            with users_code(call.func):
                try:
                    results.append(call())
                except (Exception, SystemExit) as error:
                    results.append(_Raised(error))
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            with contextlib.ExitStack() as footing:
                for i in waiting:
                    footing.enter_context(users_code(calls[i].func))
                done = _loop.run(_gather([results[i] for i in waiting]))
            for i, result in zip(waiting, done, strict=True):
                results[i] = result
    return results


async def _gather(awaitables: Sequence[Awaitable]) -> list[Any]:
    async def attempt(awaitable: Awaitable) -> Any:
        try:
            return await awaitable
        except (Exception, SystemExit) as error:
            return _Raised(error)

    return await asyncio.gather(*map(attempt, awaitables))


def _failure(
    reward: RewardFunction, error: BaseException, batch: Mapping[str, Sequence], trainer_state: Any
) -> RewardError:
    """The error for the user, with the first row on which the function, called with it alone, raises the same."""
    where = "only on the whole batch, on no single row"
    for row in range(len(batch["completions"])):
        alone = {name: values[row : row + 1] for name, values in batch.items()}
        printed = len(_printed.getvalue())
        try:
            (result,) = _run([_bound(reward, alone, trainer_state, _Log())])
        finally:
            _forget_printed(printed)  # once was enough
        if isinstance(result, _Raised) and type(result.error) is type(error):
            where = f"on row {row} (answer {batch['answer'][row]!r})"
            break
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return RewardError(
        f"reward function {reward} raised {where}: {error_text(error)} "
        f"({frame.filename}:{frame.lineno}: {frame.line})"
    )


def _forget_printed(start: int) -> None:
    _printed.seek(start)
    _printed.truncate()


# Checking


def _checked_turns(reward: RewardFunction, result: Sequence, turns: Sequence[int]) -> list[list[float]]:
    """One value per turn of each row; a row's None is NaN at each of them."""
    _check_length(reward, "list", result, len(turns))
    rows = []
    for row, (values, n) in enumerate(zip(result, turns, strict=True)):
        if values is None:
            values = [None] * n
        if not isinstance(values, list | tuple):
            raise RewardError(
                f"reward function {reward} must return for every row a list with one number per turn, since it "
                f"does for some; row {row} got {_short(values)}"
            )
        if len(values) != n:
            raise RewardError(
                f"reward function {reward} must return one number per turn of the model; row {row} has {n} "
                f"turns, got {len(values)} numbers"
            )
        rows.append([_value(reward, f"{row}, turn {turn}", value) for turn, value in enumerate(values)])
    return rows


def _checked(reward: RewardFunction, result: Any, n: int) -> list[float]:
    values = result
    if hasattr(result, "tolist"):  # arrays of numpy, jax, torch, pandas
        values = result.tolist()
    elif hasattr(result, "__array__"):  # of TensorFlow, data frames
        values = np.asarray(result).tolist()
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward function {reward} must return a list with one number or None for each of the {n} "
            f"completions, got {type(result).__name__}: {_short(result)}"
        )
    _check_length(reward, "value", values, n)
    if values is not result:
        values = [_only(value) for value in values]
    return [_value(reward, row, value) for row, value in enumerate(values)]


def _check_length(reward: RewardFunction, what: str, values: Sequence, n: int) -> None:
    if len(values) != n:
        raise RewardError(
            f"reward function {reward} must return one {what} for each of the {n} completions, got {len(values)} {what}s"
        )


def _value(reward: RewardFunction, row: int | str, value: Any) -> float:
    """One row's reward; the user's None is NaN from here on."""
    if value is None:
        return math.nan
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise RewardError(
            f"reward function {reward} must return finite numbers, or None where it does not apply to a "
            f"row; row {row} got {_short(value)}"
        )
    return number


def _number(value: Any) -> float | None:
    """What has one element and is a number, as a float; None for anything else, such as the text of a number."""
    try:
        if hasattr(value, "tolist"):
            value = _only(value.tolist())
        if isinstance(value, Real | Decimal) or (hasattr(value, "__float__") and not isinstance(value, str)):
            return float(value)
    except OverflowError:
        return math.inf
    except Exception:  # an array of several elements, a symbol without a value
        return None
    return None


def _only(value: Any) -> Any:
    """The element of a list of one, however deep: the rows of an [n, 1] array."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value


def _short(value: Any) -> str:
    return shorten(repr(value), 100)
