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
from grpo_jax.run.trl_options import EQUAL, Entry, settle, show
from grpo_jax.text import nearest
from grpo_jax.types import BUILT_IN_REWARDS

logger = logging.getLogger(__name__)
SOFT_OVERLONG = "soft_overlong"  # the reward that soft_overlong_cache adds
SCHEDULES_WITH_RULES = ("cosine_with_min_lr", "polynomial", "warmup_stable_decay")  # also without arguments


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
            event: what is due.
            total: updates of the run, of which an interval below 1 is a fraction, rounded up.
            per_epoch: updates of an epoch.
        """
        strategy = {"save": self.save_strategy, "eval": self.eval_strategy}.get(event)
        steps = {"save": self.save_steps, "eval": self.eval_steps, "logging": self.logging_steps}[event]
        if strategy == "steps" and steps is None:
            steps = self.logging_steps  # as in transformers
        if strategy == "epoch":
            return per_epoch
        if strategy == "no" or steps is None:
            return None
        return (
            int(steps) if steps >= 1 else math.ceil(total * steps - 1e-9)
        )  # 0.1 · 30 is 3, also where rounding leaves it slightly above

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
    problems += [f"{where.get(name, '')}{text}" for name, text in _contradictions(options)]
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
        for name, text in _without_effect(options):
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
        wrong = {
            e["loc"][0]: e for e in reversed(error.errors(include_url=False))
        }  # the first of each option
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
        return (
            f"{' and '.join(bounds)}{why and ' '}{why}, got {error['input']}"  # a flag's text without quotes
        )
    return KINDS[option_type(name).kind] + got


def reward_problems(options: Options, rewards: Sequence[str]) -> list[tuple[str, str]]:
    """(option, what is wrong) of options that do not fit the reward functions, given by name."""
    found = []
    if options.reward_weights is not None and len(options.reward_weights) != len(rewards):
        text = f"reward_weights needs one weight per reward function: {len(rewards)} functions "
        found.append(("reward_weights", f"{text}({', '.join(rewards)}), got {options.reward_weights}"))
    if options.stop_after_tools and "grounded" in rewards:
        text = (
            "stop_after_tools asks for no final text, which the reward grounded reads; leave one of them out"
        )
        found.append(("stop_after_tools", text))
    if options.soft_overlong_cache is not None and SOFT_OVERLONG in rewards:
        text = f"soft_overlong_cache adds a reward {SOFT_OVERLONG}, and a reward function has this name; rename it"
        found.append(("soft_overlong_cache", text))
    several = len(rewards) + (options.soft_overlong_cache is not None) > 1
    if options.multi_objective_aggregation == "normalize_then_sum" and not several:
        text = f"normalize_then_sum needs several reward functions, got {', '.join(rewards)}"
        found.append(("multi_objective_aggregation", f"multi_objective_aggregation {text}"))
    return found


def _contradictions(options: Options) -> list[tuple[str, str]]:
    """(option, what is wrong) of options that are right by themselves."""
    found = []

    # the loss
    loss, sequence = options.loss_type, options.importance_sampling_level == "sequence"
    clipped = loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
    belongs = {
        "epsilon": (clipped, "a loss_type with a lower clip (not cispo, sapo or vespo)"),
        "epsilon_high": (clipped or loss == "cispo", "a loss_type with an upper clip (not sapo or vespo)"),
        "delta": (clipped, "a clipped loss_type (not cispo, sapo or vespo)"),
        **{name: (loss == "sapo", "loss_type sapo") for name in OPTIONS if name.startswith("sapo_")},
        **{name: (loss == "vespo", "loss_type vespo") for name in OPTIONS if name.startswith("vespo_")},
    }
    for name, (acts, needs) in belongs.items():
        value = getattr(options, name)
        if not acts and value != OPTIONS[name].default:
            found.append((name, f"{name} {value} has no effect with loss_type {loss}: it needs {needs}"))
    if loss == "luspo" and not sequence:
        text = "loss_type luspo weighs a sequence's ratio by its length; set importance_sampling_level to sequence"
        found.append(("loss_type", text))
    if loss == "vespo" and sequence and not options.beta:
        text = "importance_sampling_level sequence has no effect with loss_type vespo, whose ratio is the sequence's"
        found.append(("importance_sampling_level", f"{text} already; leave it out"))
    bounds = (options.sampler_correction_min, options.sampler_correction_max)
    for name in ("sampler_correction_min", "sampler_correction_max"):
        value = getattr(options, name)
        if options.sampler_correction == "none" and value != OPTIONS[name].default:
            found.append((name, f"{name} {value} has no effect without sampler_correction"))
    if options.sampler_correction.endswith("truncate") and bounds == (None, None):
        text = f"sampler_correction {options.sampler_correction} needs sampler_correction_min or _max to truncate at"
        found.append(("sampler_correction", text))

    # lengths
    maximum = options.max_grpo_completion_length
    if options.soft_overlong_cache is not None and options.soft_overlong_cache > maximum:
        text = f"soft_overlong_cache {options.soft_overlong_cache} must be at most max_grpo_completion_length {maximum}"
        found.append(("soft_overlong_cache", text))
    if options.soft_overlong_cache is None and options.soft_overlong_penalty != 1:
        text = (
            f"soft_overlong_penalty {options.soft_overlong_penalty} has no effect without soft_overlong_cache"
        )
        found.append(("soft_overlong_penalty", text))
    if options.max_turn_length is not None and options.max_turn_length > maximum:
        text = f"max_turn_length {options.max_turn_length} has no effect above max_grpo_completion_length {maximum}"
        found.append(("max_turn_length", text))

    # the optimizer
    if options.lr_scheduler_kwargs or options.lr_scheduler_type in SCHEDULES_WITH_RULES:
        from grpo_jax.update.schedules import schedule_problem  # which imports jax

        arguments = options.lr_scheduler_kwargs
        if text := schedule_problem(options.lr_scheduler_type, options.learning_rate, arguments):
            found.append(("lr_scheduler_kwargs" if arguments else "lr_scheduler_type", text))
    if options.optim not in ("adamw", "lion") and options.optim_dtype != "float32":
        why = (
            "whose moments are float32"
            if options.optim == "muon"
            else "which keeps no moments of the weights' size"
        )
        text = (
            f"optim_dtype {options.optim_dtype} has no effect with optim {options.optim}, {why}; leave it out"
        )
        found.append(("optim_dtype", text))

    if options.optim == "adafactor" and options.use_peft:
        text = "optim adafactor saves the moments of whole weights; with use_peft, whose moments are small, use adamw"
        found.append(("optim", text))

    # evaluations that are compared
    during = options.eval_strategy in ("steps", "epoch") or (
        options.eval_strategy is None and options.eval_steps is not None
    )
    for name in ("early_stop_patience", "load_best_model_at_end"):
        if getattr(options, name) and not during:
            found.append((name, f"{name} needs evaluations during training; set eval_steps or eval_strategy"))

    # the cold start
    if options.sft_decay_steps >= options.sft_max_steps:
        text = f"sft_decay_steps {options.sft_decay_steps} must be below sft_max_steps {options.sft_max_steps}, which counts"
        found.append(("sft_decay_steps", f"{text} the decay; lower it or raise sft_max_steps"))

    # the conversation
    if options.stop_after_tools and options.sft_stop_grounded:
        text = f"sft_stop_grounded {options.sft_stop_grounded} can never be reached with stop_after_tools, which asks for"
        found.append(("sft_stop_grounded", f"{text} no final text; leave one of them out"))
    if options.stop_after_tools and options.final_tool:
        text = f"final_tool {options.final_tool} has no effect with stop_after_tools, which ends a completion before it"
        found.append(("final_tool", text))

    # the advantages
    if options.multi_objective_aggregation == "normalize_then_sum":
        for name in ("scale_rewards", "advantage_estimator"):
            if getattr(options, name) != "group":
                text = f"{name} {getattr(options, name)} has no effect with multi_objective_aggregation "
                text += "normalize_then_sum, which scales each reward by its group and their sum by the batch"
                found.append((name, f"{text}; leave it out"))
    if options.advantage_estimator == "none" and options.scale_rewards != "none":
        text = (
            f"advantage_estimator none with scale_rewards {options.scale_rewards} would divide rewards by a "
        )
        text += "deviation of 0 where they are equal; set scale_rewards to none"
        found.append(("advantage_estimator", text))
    return found


def _without_effect(options: Options) -> list[tuple[str, str]]:
    """(option, sentence) of options that were set and change nothing."""
    found = []
    for name in ("warmup_steps", "warmup_ratio"):
        value = getattr(options, name)
        if options.lr_scheduler_type == "constant" and value:
            text = f"lr_scheduler_type constant has no warm-up, so {name} {value:g} has no effect (as in "
            found.append((name, f"{text}transformers); constant_with_warmup has one"))
    if options.sft_stop_reward is not None and options.sft_stop_match != OPTIONS["sft_stop_match"].default:
        text = (
            "sft_stop_match has no effect with sft_stop_reward, which takes its place; leave one of them out"
        )
        found.append(("sft_stop_match", text))
    adam, with_adam = ("adamw", "muon"), ("adamw", "muon", "lion")
    of_optim = {"adam_beta1": with_adam, "adam_beta2": with_adam, "adam_epsilon": adam}
    for name, optimizers in of_optim.items():
        if options.optim not in optimizers and getattr(options, name) != OPTIONS[name].default:
            found.append((name, f"{name} has no effect with optim {options.optim}"))
    if options.eval_strategy in ("no", "epoch") and options.eval_steps is not None:
        found.append(("eval_steps", f"eval_steps has no effect with eval_strategy {options.eval_strategy}"))
    if options.early_stop_metric != OPTIONS["early_stop_metric"].default and not compares_evaluations(
        options
    ):
        text = "early_stop_metric has no effect without early_stop_patience or load_best_model_at_end"
        found.append(("early_stop_metric", text))
    for name, field in OPTIONS.items():
        for prefix, switch in (
            ("lora_", "use_peft"),
            ("use_rslora", "use_peft"),
            ("dynamic_sampling_", "dynamic_sampling"),
            ("difficulty_floor", "difficulty_sampling"),
        ):
            unused = name.startswith(prefix) and not getattr(options, switch)
            if unused and getattr(options, name) != field.default:
                found.append((name, f"{name} has no effect without {switch}"))
    return found


def compares_evaluations(options: Options) -> bool:
    """Whether the run keeps its best evaluation, to stop by it or to end with its weights."""
    return options.early_stop_patience is not None or options.load_best_model_at_end


def check_no_evaluation_is_due(options: Options) -> None:
    """For a run without evaluation data.

    Raises:
        ValueError: options that need evaluations, as HF's Trainer does too.
    """
    if compares_evaluations(options):
        raise ValueError(
            "early_stop_patience and load_best_model_at_end compare evaluations; set eval_dataset_id_or_path"
        )
    if options.eval_strategy in ("steps", "epoch"):
        raise ValueError(
            f"eval_strategy {options.eval_strategy} needs evaluation data; set eval_dataset_id_or_path"
        )
    if options.eval_strategy is None and options.eval_steps is not None:
        logger.warning("eval_steps has no effect without evaluation data; set eval_dataset_id_or_path")


def compute_dtype(option: str, on_cpu: bool) -> str:
    """The data type of the computation that the option `dtype` means on a device."""
    return ("float32" if on_cpu else "bfloat16") if option == "auto" else option


def _or(values: list) -> str:
    return " or ".join(map(str, values))
