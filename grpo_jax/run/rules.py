"""What the options of a run say of one another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from grpo_jax.run.fields import OPTIONS, Options

logger = logging.getLogger(__name__)
SOFT_OVERLONG = "soft_overlong"  # the reward that soft_overlong_cache adds
SCHEDULES_WITH_RULES = ("cosine_with_min_lr", "polynomial", "warmup_stable_decay")  # also without arguments
SWITCHED_BY = {  # beginning of an option's name: the option without which it has no effect
    "lora_": "use_peft",
    "use_rslora": "use_peft",
    "dynamic_sampling_": "dynamic_sampling",
    "difficulty_floor": "difficulty_sampling",
}
Problems = Iterator[tuple[str, str]]  # (option, what is wrong with it)

# A rule: the options that it is about, when they break it, and what to say then. The condition and the text have
# every option by its name, and of the one that is looked at `name`, `value` and `given`: it is not the default.
Rule = tuple[str, Callable[[Any], Any], str]

BEFORE_SCHEDULE: tuple[Rule, ...] = (
    # loss
    (
        "loss_type",
        lambda o: o.value == "luspo" and o.importance_sampling_level != "sequence",
        "loss_type luspo weighs a sequence's ratio by its length; set importance_sampling_level to sequence",
    ),
    (
        "importance_sampling_level",
        lambda o: o.value == "sequence" and o.loss_type == "vespo" and not o.beta,
        "importance_sampling_level sequence has no effect with loss_type vespo, whose ratio is the sequence's "
        "already; leave it out",
    ),
    (
        "sampler_correction_min sampler_correction_max",
        lambda o: o.given and o.sampler_correction == "none",
        "{name} {value} has no effect without sampler_correction",
    ),
    (
        "sampler_correction",
        lambda o: (
            o.value.endswith("truncate")
            and o.sampler_correction_min is None
            and o.sampler_correction_max is None
        ),
        "sampler_correction {value} needs sampler_correction_min or _max to truncate at",
    ),
    # advantages
    (
        "scale_rewards advantage_estimator",
        lambda o: o.value != "group" and o.multi_objective_aggregation == "normalize_then_sum",
        "{name} {value} has no effect with multi_objective_aggregation normalize_then_sum, which scales "
        "each reward by its group and their sum by the batch; leave it out",
    ),
    (
        "advantage_estimator",
        lambda o: o.value == "none" and o.scale_rewards != "none",
        "advantage_estimator none with scale_rewards {scale_rewards} would divide rewards by a deviation "
        "of 0 where they are equal; set scale_rewards to none",
    ),
    # lengths
    (
        "soft_overlong_cache",
        lambda o: o.value is not None and o.value > o.max_grpo_completion_length,
        "soft_overlong_cache {value} must be at most max_grpo_completion_length {max_grpo_completion_length}",
    ),
    (
        "soft_overlong_penalty",
        lambda o: o.value != 1 and o.soft_overlong_cache is None,
        "soft_overlong_penalty {value} has no effect without soft_overlong_cache",
    ),
    (
        "max_turn_length",
        lambda o: o.value is not None and o.value > o.max_grpo_completion_length,
        "max_turn_length {value} has no effect above max_grpo_completion_length {max_grpo_completion_length}",
    ),
)
AFTER_SCHEDULE: tuple[Rule, ...] = (
    # optimizer
    (
        "optim_dtype",
        lambda o: o.value != "float32" and o.optim == "muon",
        "optim_dtype {value} has no effect with optim muon, whose moments are float32; leave it out",
    ),
    (
        "optim_dtype",
        lambda o: o.value != "float32" and o.optim not in ("adamw", "lion", "muon"),
        "optim_dtype {value} has no effect with optim {optim}, which keeps no moments of the weights' size; leave it out",
    ),
    (
        "optim",
        lambda o: o.value in ("adafactor", "muon") and o.use_peft,
        "optim {value} is for the matrices of whole weights; with use_peft, which trains small factors, use adamw",
    ),
    # evaluation
    (
        "early_stop_patience load_best_model_at_end",
        lambda o: o.value and (o.eval_strategy == "no" or (o.eval_strategy is None and o.eval_steps is None)),
        "{name} needs evaluations during training; set eval_steps or eval_strategy",
    ),
    # conversation
    (
        "sft_stop_grounded",
        lambda o: o.value and o.stop_after_tools,
        "sft_stop_grounded {value} can never be reached with stop_after_tools, which asks for "
        "no final text; leave one of them out",
    ),
    (
        "final_tool",
        lambda o: o.value and o.stop_after_tools,
        "final_tool {value} has no effect with stop_after_tools, which ends a completion before it",
    ),
)
OF_REWARDS: tuple[Rule, ...] = (  # `rewards`: their names; `listed`: these as text
    (
        "reward_weights",
        lambda o: o.value is not None and len(o.value) != len(o.rewards),
        "reward_weights needs one weight per reward function: {number} functions ({listed}), got {value}",
    ),
    (
        "stop_after_tools",
        lambda o: o.value and "grounded" in o.rewards,
        "stop_after_tools asks for no final text, which the reward grounded reads; leave one of them out",
    ),
    (
        "soft_overlong_cache",
        lambda o: o.value is not None and SOFT_OVERLONG in o.rewards,
        f"soft_overlong_cache adds a reward {SOFT_OVERLONG}, and a reward function has this name; rename it",
    ),
    (
        "multi_objective_aggregation",
        lambda o: o.value == "normalize_then_sum" and o.number + (o.soft_overlong_cache is not None) < 2,
        "multi_objective_aggregation normalize_then_sum needs several reward functions, got {listed}",
    ),
)
WITHOUT_EFFECT: tuple[Rule, ...] = (
    (
        "warmup_steps warmup_ratio",
        lambda o: o.value and o.lr_scheduler_type == "constant",
        "lr_scheduler_type constant has no warm-up, so {name} {value:g} has no effect (as in transformers); "
        "constant_with_warmup has one",
    ),
    (
        "sft_stop_match",
        lambda o: o.given and o.sft_stop_reward is not None,
        "sft_stop_match has no effect with sft_stop_reward, which takes its place; leave one of them out",
    ),
    (
        "adam_beta1 adam_beta2",
        lambda o: o.given and o.optim not in ("adamw", "muon", "lion"),
        "{name} has no effect with optim {optim}",
    ),
    (
        "adam_epsilon",
        lambda o: o.given and o.optim not in ("adamw", "muon"),
        "adam_epsilon has no effect with optim {optim}",
    ),
    (
        "eval_steps",
        lambda o: o.value is not None and o.eval_strategy in ("no", "epoch"),
        "eval_steps has no effect with eval_strategy {eval_strategy}",
    ),
    (
        "early_stop_metric",
        lambda o: o.given and not compares_evaluations(o),
        "early_stop_metric has no effect without early_stop_patience or load_best_model_at_end",
    ),
)


def _broken(rules: Sequence[Rule], options: Options, **more: Any) -> Problems:
    for names, breaks, text in rules:
        for name in names.split():
            value = getattr(options, name)
            given = value != OPTIONS[name].default
            o = SimpleNamespace(**vars(options), **more, name=name, value=value, given=given)
            if breaks(o):
                yield name, text.format_map(vars(o))


def contradictions(options: Options) -> Problems:
    """What is wrong with options that are right by themselves."""
    loss = options.loss_type
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
            yield name, f"{name} {value} has no effect with loss_type {loss}: it needs {needs}"
    yield from _broken(BEFORE_SCHEDULE, options)
    schedule, arguments = options.lr_scheduler_type, options.lr_scheduler_kwargs
    if arguments or schedule in SCHEDULES_WITH_RULES:
        from grpo_jax.update.schedules import schedule_problem  # which imports jax

        if text := schedule_problem(schedule, options.learning_rate, arguments):
            yield "lr_scheduler_kwargs" if arguments else "lr_scheduler_type", text
    yield from _broken(AFTER_SCHEDULE, options)


def reward_problems(options: Options, rewards: Sequence[str]) -> Problems:
    """What is wrong with options that do not fit the reward functions, given by name."""
    return _broken(OF_REWARDS, options, rewards=rewards, number=len(rewards), listed=", ".join(rewards))


def without_effect(options: Options) -> Problems:
    """Options that were set and change nothing."""
    yield from _broken(WITHOUT_EFFECT, options)
    for name, field in OPTIONS.items():
        switch = next((switch for prefix, switch in SWITCHED_BY.items() if name.startswith(prefix)), None)
        if switch and not getattr(options, switch) and getattr(options, name) != field.default:
            yield name, f"{name} has no effect without {switch}"


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
