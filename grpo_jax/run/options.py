"""GRPOConfig: the options of a run, checked all at once, under this package's names and TRL's."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from grpo_jax.files import is_url
from grpo_jax.run.fields import KINDS, OPTIONS, Options, option_type
from grpo_jax.run.rules import contradictions, reward_problems, without_effect
from grpo_jax.run.trl_options import EQUAL, Entry, settle, show
from grpo_jax.text import nearest
from grpo_jax.types import BUILT_IN_REWARDS

logger = logging.getLogger(__name__)


class UnknownOption(ValueError, TypeError):
    """No option has this name: a TypeError, as for any unknown keyword, and a ValueError, as for wrong options."""


class GRPOConfig(Options):
    """Every option of a run; what each does is its line in `python -m grpo_jax.train --help`.

    Takes TRL's keyword names too: what has no effect here is named in a warning.

    Raises:
        ValueError: values are wrong, contradict one another, or ask for what is not supported; has a
            sentence for each.
        UnknownOption: one of the keywords names no option; has the nearest name too.
    """

    __signature__: ClassVar = inspect.signature(Options)  # what notebooks and help() show
    _given: ClassVar[dict[str, Any]] = {}  # the paths as they were before with_absolute_paths

    def __init__(self, **options: Any):
        values, _ = resolve([[(name, value, "") for name, value in options.items()]])
        super().__init__(**values)

    def batch_size(self, devices: int) -> int:
        """Completions per update: B = per device × devices × accumulation.

        Args:
            devices: devices along data and fsdp together.

        Raises:
            ValueError: B does not divide by num_generations (names the nearest values that do), or is not
                generation_batch_size.
        """
        per_step, steps = self.per_device_train_batch_size * devices, self.gradient_accumulation_steps
        size, group = per_step * steps, self.num_generations
        product = (
            f"{size} = per_device_train_batch_size {self.per_device_train_batch_size} × "
            f"{devices} device{'s' * (devices > 1)} × gradient_accumulation_steps {steps}"
        )
        if self.generation_batch_size not in (None, size):
            raise ValueError(
                f"generation_batch_size must equal the completions per update, {product}, got "
                f"{self.generation_batch_size}; leave it out, or change one of these"
            )
        if size % group == 0:
            return size
        unit = group // math.gcd(per_step, group)
        below = steps // unit * unit
        valid_steps = [s for s in (below, below + unit) if s > 0]
        divisors = [g for g in range(2, size + 1) if size % g == 0]
        close = sorted(sorted(divisors, key=lambda g: abs(g - group))[:2])
        raise ValueError(
            f"completions per update must divide by num_generations {group}, got {product}; nearest valid: "
            f"gradient_accumulation_steps {_or(valid_steps)}"
            + (f", or num_generations {_or(close)}" if close else "")
        )

    def warmup_updates(self, total: int) -> int:
        """Updates of warm-up in a run of `total` updates, as transformers counts them."""
        share = self.warmup_steps or self.warmup_ratio or 0.0
        return int(share) if self.warmup_steps >= 1 else math.ceil(total * share)

    def interval(self, event: Literal["save", "eval", "logging"], total: int, per_epoch: int) -> int | None:
        """Updates between two checkpoints, evaluations or printed lines; None for none during training.

        Args:
            total: updates of the run, of which an interval below 1 is a fraction, rounded up.
        """
        strategy = {"save": self.save_strategy, "eval": self.eval_strategy}.get(event)
        steps = {"save": self.save_steps, "eval": self.eval_steps, "logging": self.logging_steps}[event]
        if strategy == "steps" and steps is None:
            steps = self.logging_steps  # as in transformers
        if strategy == "epoch":
            return per_epoch
        if strategy == "no" or steps is None:
            return None
        # 0.1 · 30 is 3, also where rounding leaves it slightly above
        return int(steps) if steps >= 1 else math.ceil(total * steps - 1e-9)

    def required(self, name: str) -> str:
        """The value of an option that this command requires.

        Raises:
            ValueError: it is not set.
        """
        if getattr(self, name) is None:
            raise ValueError(f"{name} must be set: --{name} VALUE, or {name}: VALUE in the YAML file")
        return getattr(self, name)

    def with_absolute_paths(self) -> GRPOConfig:
        """The same options with absolute paths, so that code which changes the working directory moves nothing.

        Data, models and tokenizers may be names of the hub: only what exists is taken as a path.
        """
        paths = {name: field.json_schema_extra["path"] for name, field in OPTIONS.items()}
        given = {n: getattr(self, n) for n, kind in paths.items() if kind and getattr(self, n) is not None}
        changed = {n: _absolute(value, paths[n]) for n, value in given.items()}
        config = dataclasses.replace(self, **changed)
        object.__setattr__(config, "_given", given | self._given)
        return config

    def with_output_dir(self, folder: str) -> GRPOConfig:
        """The same options with the results in another folder, and output_dir as it was given."""
        config = dataclasses.replace(self, output_dir=folder)
        object.__setattr__(config, "_given", {"output_dir": self.output_dir} | self._given)
        return config

    def as_given(self) -> dict[str, Any]:
        """Every option, paths as they were given."""
        return dataclasses.asdict(self) | self._given


def _absolute(value: Any, kind: str) -> Any:
    if isinstance(value, list):
        return [_absolute(one, kind) for one in value]
    if value in ("none", "scratch", *BUILT_IN_REWARDS) or value.startswith("tfds:") or is_url(value):
        return value
    path = re.sub(r"\[[^\[\]]*\]$", "", value) if kind == "data" else value  # without a slice
    if kind != "file" and not os.path.exists(os.path.expanduser(path)):
        return value
    return os.path.abspath(os.path.expanduser(path)) + value[len(path) :]


# --- from names and values to options ---


def resolve(
    sources: Iterable[Iterable[Entry]], problems: Iterable[str] = (), rewards: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """The options that some sources give, the later ones overriding the earlier, after all checks.

    Args:
        sources: entries of a file, of the flags, of a call.
        problems: what was found wrong before, to be reported with the rest.
        rewards: names of the reward functions where no option names one; none where these are not known yet,
            as in Python.

    Returns:
        the value of every option, and the prefix that says where it was given of those that were.

    Raises:
        ValueError, UnknownOption: as `GRPOConfig`.
    """
    found: dict[str, tuple[Any, str]] = {}
    sources, problems, unknown = [list(source) for source in sources], list(problems), False
    for source in sources:
        settled = settle(source, OPTIONS)
        problems += settled.problems
        unknown |= settled.unknown
        # The more specific of two options for one thing wins, but a flag wins over the file's.
        for name, stronger in (
            ("reward_function_name", "reward_fn"),
            ("tool_functions_module", "tools_script"),
        ):
            if name in settled.found:
                found.pop(stronger, None)
        found |= settled.found
    equal = {name: found.pop(name) for name in EQUAL if name in found}
    where = {name: prefix for name, (_, prefix) in found.items()}
    options, wrong = _checked({name: value for name, (value, _) in found.items()})
    problems += [f"{where[name]}{text}" for name, text in wrong]
    problems += [f"{where.get(name, '')}{text}" for name, text in contradictions(options)]
    rewards = options.reward_fn or options.reward_function_name or rewards
    problems += [
        f"{where.get(name, '')}{text}" for name, text in rewards and reward_problems(options, rewards)
    ]
    for name, (value, prefix) in equal.items():
        option, reason = EQUAL[name]
        if value not in (None, getattr(options, option), str(getattr(options, option))):
            problems.append(
                f"{prefix}{name} must equal {option} {getattr(options, option)}, got {show(value)}: {reason}"
            )
    if problems:
        places = [prefix for source in sources for _, _, prefix in source if prefix]
        problems.sort(key=lambda text: next((i for i, p in enumerate(places) if text.startswith(p)), -1))
        text = "\n".join([f"{len(problems)} options are wrong:", *(f"  {p}" for p in problems)])
        raise (UnknownOption if unknown else ValueError)(problems[0] if len(problems) == 1 else text)
    if len(found) < len(OPTIONS):  # a copy gives them all, and has nothing new to say
        for name, text in without_effect(options):
            logger.warning("%s%s", where.get(name, ""), text)
    return {name: getattr(options, name) for name in OPTIONS}, where


def check_option(name: str, value: Any) -> Any:
    """The value of one option in its type.

    Raises:
        ValueError: it has another type, or breaks the option's rule.
    """
    options, wrong = _checked({name: value})
    if wrong:
        raise ValueError(wrong[0][1])
    return getattr(options, name)


def _checked(values: dict[str, Any]) -> tuple[Options, list[tuple[str, str]]]:
    """Options of the right ones of some values, and (option, what is wrong) of the others."""
    try:
        return Options(**values), []
    except ValidationError as error:
        # the first of each option
        wrong = {e["loc"][0]: e for e in reversed(error.errors(include_url=False))}
    problems = [(n, f"{n} must be {_rule_of(n, wrong[n])}") for n in values if n in wrong]
    return Options(**{n: v for n, v in values.items() if n not in wrong}), problems


def _rule_of(name: str, error: Mapping[str, Any]) -> str:
    """What an option must be and is not, in words."""
    got = f", got {show(error['input'])}"
    field, kind = OPTIONS[name], error["type"]
    if kind == "literal_error":
        choices = option_type(name).choices
        close = nearest(str(error["input"]), choices, cutoff=0.6)
        hint = f"; nearest: {close[0]}" if close else ""
        why = field.json_schema_extra["why"]
        return f"one of {', '.join(choices)}{why and ' '}{why}{got}{hint}"
    if kind == "value_error":
        return f"{error['ctx']['error']}{got}"
    if kind.startswith(("greater_than", "less_than")):
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        bounds = [f"{signs[s]} {getattr(m, s)}" for m in field.metadata for s in signs if hasattr(m, s)]
        why = field.json_schema_extra["why"]
        # a flag's text without quotes
        return f"{' and '.join(bounds)}{why and ' '}{why}, got {error['input']}"
    return KINDS[option_type(name).kind] + got


def compute_dtype(option: str, on_cpu: bool) -> str:
    """The data type of the computation that the option `dtype` means on a device."""
    return ("float32" if on_cpu else "bfloat16") if option == "auto" else option


def _or(values: list) -> str:
    return " or ".join(map(str, values))
