"""What the options of a run say of one another."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

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


def contradictions(options: Options) -> Problems:
    """What is wrong with options that are right by themselves."""
    rules = (
        _of_loss,
        _of_advantages,
        _of_lengths,
        _of_optimizer,
        _of_evaluation,
        _of_conversation,
    )
    return itertools.chain.from_iterable(rule(options) for rule in rules)


def _of_loss(options: Options) -> Problems:
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
            yield name, f"{name} {value} has no effect with loss_type {loss}: it needs {needs}"
    if loss == "luspo" and not sequence:
        yield (
            "loss_type",
            "loss_type luspo weighs a sequence's ratio by its length; set importance_sampling_level to sequence",
        )
    if loss == "vespo" and sequence and not options.beta:
        yield (
            "importance_sampling_level",
            "importance_sampling_level sequence has no effect with loss_type vespo, whose ratio is the sequence's "
            "already; leave it out",
        )
    correction = options.sampler_correction
    bounds = {name: getattr(options, name) for name in ("sampler_correction_min", "sampler_correction_max")}
    for name, value in bounds.items():
        if correction == "none" and value != OPTIONS[name].default:
            yield name, f"{name} {value} has no effect without sampler_correction"
    if correction.endswith("truncate") and set(bounds.values()) == {None}:
        yield (
            "sampler_correction",
            f"sampler_correction {correction} needs sampler_correction_min or _max to truncate at",
        )


def _of_advantages(options: Options) -> Problems:
    if options.multi_objective_aggregation == "normalize_then_sum":
        for name in ("scale_rewards", "advantage_estimator"):
            if (value := getattr(options, name)) != "group":
                yield (
                    name,
                    f"{name} {value} has no effect with multi_objective_aggregation normalize_then_sum, which scales "
                    "each reward by its group and their sum by the batch; leave it out",
                )
    if options.advantage_estimator == "none" and options.scale_rewards != "none":
        yield (
            "advantage_estimator",
            f"advantage_estimator none with scale_rewards {options.scale_rewards} would divide rewards by a deviation "
            "of 0 where they are equal; set scale_rewards to none",
        )


def _of_lengths(options: Options) -> Problems:
    maximum, cache = options.max_grpo_completion_length, options.soft_overlong_cache
    if cache is not None and cache > maximum:
        yield (
            "soft_overlong_cache",
            f"soft_overlong_cache {cache} must be at most max_grpo_completion_length {maximum}",
        )
    if cache is None and (penalty := options.soft_overlong_penalty) != 1:
        yield (
            "soft_overlong_penalty",
            f"soft_overlong_penalty {penalty} has no effect without soft_overlong_cache",
        )
    if (turn := options.max_turn_length) is not None and turn > maximum:
        yield (
            "max_turn_length",
            f"max_turn_length {turn} has no effect above max_grpo_completion_length {maximum}",
        )


def _of_optimizer(options: Options) -> Problems:
    schedule, arguments, optim = options.lr_scheduler_type, options.lr_scheduler_kwargs, options.optim
    if arguments or schedule in SCHEDULES_WITH_RULES:
        from grpo_jax.update.schedules import schedule_problem  # which imports jax

        if text := schedule_problem(schedule, options.learning_rate, arguments):
            yield "lr_scheduler_kwargs" if arguments else "lr_scheduler_type", text
    if optim not in ("adamw", "lion") and options.optim_dtype != "float32":
        moments = (
            "whose moments are float32" if optim == "muon" else "which keeps no moments of the weights' size"
        )
        yield (
            "optim_dtype",
            f"optim_dtype {options.optim_dtype} has no effect with optim {optim}, {moments}; leave it out",
        )
    if optim in ("adafactor", "muon") and options.use_peft:
        yield (
            "optim",
            f"optim {optim} is for the matrices of whole weights; with use_peft, which trains small factors, use adamw",
        )


def _of_evaluation(options: Options) -> Problems:
    strategy = options.eval_strategy or ("no" if options.eval_steps is None else "steps")
    for name in ("early_stop_patience", "load_best_model_at_end"):
        if getattr(options, name) and strategy == "no":
            yield name, f"{name} needs evaluations during training; set eval_steps or eval_strategy"


def _of_conversation(options: Options) -> Problems:
    if options.stop_after_tools and options.sft_stop_grounded:
        yield (
            "sft_stop_grounded",
            f"sft_stop_grounded {options.sft_stop_grounded} can never be reached with stop_after_tools, which asks for "
            "no final text; leave one of them out",
        )
    if options.stop_after_tools and options.final_tool:
        yield (
            "final_tool",
            f"final_tool {options.final_tool} has no effect with stop_after_tools, which ends a completion before it",
        )


def reward_problems(options: Options, rewards: Sequence[str]) -> Problems:
    """What is wrong with options that do not fit the reward functions, given by name."""
    cache, weights = options.soft_overlong_cache, options.reward_weights
    if weights is not None and len(weights) != len(rewards):
        yield (
            "reward_weights",
            f"reward_weights needs one weight per reward function: {len(rewards)} functions ({', '.join(rewards)}), "
            f"got {weights}",
        )
    if options.stop_after_tools and "grounded" in rewards:
        yield (
            "stop_after_tools",
            "stop_after_tools asks for no final text, which the reward grounded reads; leave one of them out",
        )
    if cache is not None and SOFT_OVERLONG in rewards:
        yield (
            "soft_overlong_cache",
            f"soft_overlong_cache adds a reward {SOFT_OVERLONG}, and a reward function has this name; rename it",
        )
    several = len(rewards) + (cache is not None) > 1
    if options.multi_objective_aggregation == "normalize_then_sum" and not several:
        yield (
            "multi_objective_aggregation",
            "multi_objective_aggregation normalize_then_sum needs several reward functions, got "
            f"{', '.join(rewards)}",
        )


def without_effect(options: Options) -> Problems:
    """Options that were set and change nothing."""
    given = {name for name, field in OPTIONS.items() if getattr(options, name) != field.default}
    if options.lr_scheduler_type == "constant":
        for name in ("warmup_steps", "warmup_ratio"):
            if value := getattr(options, name):
                yield (
                    name,
                    f"lr_scheduler_type constant has no warm-up, so {name} {value:g} has no effect (as in transformers); "
                    "constant_with_warmup has one",
                )
    if options.sft_stop_reward is not None and "sft_stop_match" in given:
        yield (
            "sft_stop_match",
            "sft_stop_match has no effect with sft_stop_reward, which takes its place; leave one of them out",
        )
    with_adam = ("adamw", "muon")
    read_by = {
        "adam_beta1": (*with_adam, "lion"),
        "adam_beta2": (*with_adam, "lion"),
        "adam_epsilon": with_adam,
    }
    for name, optimizers in read_by.items():
        if name in given and options.optim not in optimizers:
            yield name, f"{name} has no effect with optim {options.optim}"
    if options.eval_strategy in ("no", "epoch") and options.eval_steps is not None:
        yield "eval_steps", f"eval_steps has no effect with eval_strategy {options.eval_strategy}"
    if "early_stop_metric" in given and not compares_evaluations(options):
        yield (
            "early_stop_metric",
            "early_stop_metric has no effect without early_stop_patience or load_best_model_at_end",
        )
    for name in OPTIONS:
        switches = [switch for prefix, switch in SWITCHED_BY.items() if name.startswith(prefix)]
        if name in given and switches and not getattr(options, switches[0]):
            yield name, f"{name} has no effect without {switches[0]}"


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
