"""The options: one frozen dataclass, with the checks of their values.

Names, meanings and defaults are those of TRL 1.16's GRPOConfig where the option
exists there, and of the original recipe's arguments otherwise. Two depart from
TRL: `dtype` (auto) and `log_level`.
"""

# ruff: noqa: RUF009 (_opt makes a dataclasses.field, new for each option)

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from grpo_jax.run.trackers import PACKAGES

Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, and the test of it

ONE_OR_MORE: Rule = (">= 1", lambda v: v >= 1)
ZERO_OR_MORE: Rule = (">= 0", lambda v: v >= 0)
ABOVE_ZERO: Rule = ("> 0", lambda v: v > 0)
SHARE: Rule = ("in (0, 1]", lambda v: 0 < v <= 1)
VESPO_LAMBDA: Rule = (">= 1e-4, below which TRL cuts it", lambda v: v >= 1e-4)
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DECAY: Rule = ("in [0, 1)", lambda v: 0 <= v < 1)
COLUMN_NAMES: Rule = (
    'column names, as {"prompt": "question"}',
    lambda v: all(name and isinstance(name, str) for pair in v.items() for name in pair),
)
FILE_SIZE: Rule = (
    "a number above 0 and its unit KB, MB, GB or TB, as 5GB or 500MB",
    lambda v: re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", v, re.IGNORECASE) is not None,
)


def _opt(default: Any, help: str, rule: Rule | None = None, **meta: Any) -> Any:
    """A field: default, one line of help, rule; `choices`, and `spellings` of them from elsewhere.

    The text none unsets an optional option, but for one with `keeps_none`, where it is a value.
    """
    metadata = {"help": help, "rule": rule, **meta}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every option of a run; what they do is in each field's help.

    Raises:
        ValueError: when a value has the wrong type, breaks its rule, or contradicts another.
    """

    tools_script: str | None = _opt(None, "Python file exporting TOOL_FUNCTIONS; wins over the module.")
    tool_functions_module: str = _opt(
        "tools_funcs.financial_tools_complex", "Python module exporting TOOL_FUNCTIONS."
    )
    tool_executor: str = _opt(
        "process", "Run tools in worker processes or inline, in this one.", choices=("process", "inline")
    )
    tool_timeout: float = _opt(5.0, "Seconds until a tool call is stopped.", ABOVE_ZERO)
    tool_memory_limit: int = _opt(1024, "Memory of a tool worker in MB.", ONE_OR_MORE)
    tool_cache: bool = _opt(True, "Run equal calls of a step once: tools are pure.")
    verify_purity: bool = _opt(
        False, "Run up to 8 calls of a training step twice and report tools whose results differ."
    )
    tool_arg_validation: str = _opt(
        "strict", "Whether text may stand for a number in a call (lax) or not.", choices=("strict", "lax")
    )
    max_tool_calling_iterations: int | None = _opt(
        None, "Tool turns of a conversation at most; unset: as the budget allows.", ONE_OR_MORE
    )
    malformed_call_feedback: bool = _opt(False, "Answer a call that does not parse with the reason.")

    reward_fn: list[str] | None = _opt(None, "Python files exporting reward_func; win over the name.")
    reward_function_name: list[str] | None = _opt(None, "Built-in rewards; unset: accuracy.")
    reward_weights: list[float] | None = _opt(None, "One weight per reward function; unset: all 1.")

    dataset_id_or_path: str | None = _opt(None, "Training rows: a JSONL file, tfds:name or owner/name.")
    eval_dataset_id_or_path: str | None = _opt(None, "Evaluation rows, of the same kinds.")
    dataset_columns: dict = _opt(
        {}, 'Rename columns of both data sets, as {"prompt": "question"} (ours: theirs).', COLUMN_NAMES
    )
    system_prompt: str | None = _opt(None, "System message for rows that have none.")
    max_prompt_length: int | None = _opt(
        None, "Tokens of a prompt at most; unset: the data's longest.", ONE_OR_MORE
    )
    overlong_prompts: str = _opt("error", "What to do with longer prompts.", choices=("error", "drop"))

    model_name_or_path: str | None = _opt(
        None, "Model folder, hub id, or scratch: a new small model with its own tokenizer."
    )
    model_revision: str = _opt("main", "Branch, tag or commit of a hub model.")
    tokenizer_name_or_path: str | None = _opt(None, "Tokenizer folder or hub id; unset: the model's.")
    dtype: str = _opt(
        "auto",
        "Type of the computation; auto: float32 on CPU, bfloat16 on accelerators.",
        choices=("auto", "float32", "bfloat16"),
    )
    param_dtype: str = _opt(
        "float32", "Type in which the trained weights are kept.", choices=("float32", "bfloat16")
    )
    optim_dtype: str = _opt(
        "float32", "Type in which AdamW's moments are kept.", choices=("float32", "bfloat16")
    )
    max_shard_size: str = _opt("5GB", "Of one weight file of a written model.", FILE_SIZE)
    chat_template_kwargs: dict = _opt({}, 'Passed to the chat template, as {"enable_thinking": false}.')

    use_peft: bool = _opt(False, "Train LoRA adapters instead of the weights.")
    lora_r: int = _opt(16, "Rank of the adapters.", ONE_OR_MORE)
    lora_alpha: float = _opt(32.0, "The adapters' product is scaled by lora_alpha / lora_r.", ABOVE_ZERO)
    lora_dropout: float = _opt(0.05, "Dropout on the adapters' input in updates.", DECAY)
    lora_target_modules: list[str] | None = _opt(
        None,
        "Modules with adapters, or all-linear for all of them; unset: q_proj v_proj, PEFT's own.",
        choices=(*LORA_MODULES, "all-linear"),
    )

    num_train_epochs: float = _opt(3.0, "Passes over the training rows.", ABOVE_ZERO)
    max_steps: int = _opt(
        -1, "Updates; -1: by num_train_epochs.", ("-1 or >= 1", lambda v: v == -1 or v >= 1)
    )
    per_device_train_batch_size: int = _opt(
        8, "Completions per device (along data and fsdp) and accumulation step.", ONE_OR_MORE
    )
    gradient_accumulation_steps: int = _opt(1, "Accumulation steps per update.", ONE_OR_MORE)
    num_generations: int = _opt(
        8, "Completions per prompt, ranked with one another.", (">= 2 to rank completions", lambda v: v >= 2)
    )
    max_grpo_completion_length: int = _opt(
        512, "Tokens after the prompt at most, tool responses included.", ONE_OR_MORE
    )
    mask_truncated_completions: bool = _opt(False, "Learn nothing from rows that ended by the budget.")
    temperature: float = _opt(1.0, "Temperature of the sampling.", ABOVE_ZERO)
    top_p: float = _opt(1.0, "Sample from the likeliest tokens of this mass.", SHARE)
    top_k: int = _opt(0, "Sample from this many tokens; 0: all.", ZERO_OR_MORE)
    min_p: float | None = _opt(
        None,
        "Sample tokens of at least this share of the likeliest's mass.",
        ("in [0, 1]", lambda v: 0 <= v <= 1),
    )
    beta: float = _opt(0.0, "Weight of the KL to the frozen first model; 0: no reference.", ZERO_OR_MORE)
    epsilon: float = _opt(0.2, "Lower clip of the ratio: 1 - epsilon.", ABOVE_ZERO)
    epsilon_high: float | None = _opt(
        None, "Upper clip: 1 + epsilon_high, in cispo epsilon_high itself; unset: epsilon.", ABOVE_ZERO
    )
    delta: float | None = _opt(
        None,
        "Ceiling of the ratio of rows worse than their group; unset: no ceiling.",
        ("> 1, the ratio of an unchanged policy", lambda v: v > 1),
    )
    loss_type: str = _opt(
        "dapo",
        "The loss of a token, and how tokens are averaged.",
        choices=("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    )
    scale_rewards: str = _opt(
        "group",
        "Divide advantages by the deviation of the group, the batch, or nothing.",
        choices=("group", "batch", "none"),
        spellings={"true": "group", "false": "none"},  # TRL's older form
    )
    importance_sampling_level: str = _opt(
        "token", "A ratio per token, or one per sequence.", choices=("token", "sequence")
    )
    top_entropy_quantile: float = _opt(
        1.0, "Learn from this share of a batch's sampled tokens, those of highest entropy.", SHARE
    )
    num_iterations: int = _opt(1, "Updates per batch of completions.", ONE_OR_MORE)
    use_bias_correction_kl: bool = _opt(True, "Multiply the KL by the importance ratio.")
    sapo_temperature_pos: float = _opt(1.0, "Gate of loss_type sapo for advantages above 0.", ABOVE_ZERO)
    sapo_temperature_neg: float = _opt(1.05, "Gate of loss_type sapo for the others.", ABOVE_ZERO)
    vespo_k_pos: float = _opt(2.0, "Exponent of loss_type vespo for advantages >= 0.", ZERO_OR_MORE)
    vespo_lambda_pos: float = _opt(3.0, "Decay of loss_type vespo for advantages >= 0.", VESPO_LAMBDA)
    vespo_k_neg: float = _opt(3.0, "Exponent of loss_type vespo for the others.", ZERO_OR_MORE)
    vespo_lambda_neg: float = _opt(2.0, "Decay of loss_type vespo for the others.", VESPO_LAMBDA)
    entropy_coef: float = _opt(0.0, "Weight of the mean entropy, which the loss is lowered by.")
    off_policy_mask_threshold: float | None = _opt(
        None,
        "Leave out rows worse than their group that lost more than this since sampling, in nats a token.",
        ABOVE_ZERO,
    )
    sampler_correction: str = _opt(
        "none",
        "Weigh tokens, or sequences, by trainer's over sampler's probability; outside the bounds: cut or 0.",
        choices=("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    )
    sampler_correction_min: float | None = _opt(
        None, "Lower bound of that weight; unset: none.", ("in [0, 1]", lambda v: 0 <= v <= 1)
    )
    sampler_correction_max: float | None = _opt(
        3.0, "Upper bound of that weight; none: no bound.", (">= 1", lambda v: v >= 1)
    )
    multi_objective_aggregation: str = _opt(
        "sum_then_normalize",
        "Sum the rewards and rank the sums, or rank each reward and sum the ranks (GDPO).",
        choices=("sum_then_normalize", "normalize_then_sum"),
    )
    advantage_estimator: str = _opt(
        "group",
        "Baseline of a reward: its group's mean, the mean of the group's others, or 0.",
        choices=("group", "loo", "none"),
    )

    learning_rate: float = _opt(1e-6, "Peak learning rate.", ZERO_OR_MORE)
    lr_scheduler_type: str = _opt(
        "linear",
        "Learning rate after the warm-up.",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    warmup_steps: float = _opt(
        0.0,
        "Updates of warm-up; below 1: share of all updates.",
        (">= 0, and whole from 1 on", lambda v: 0 <= v < 1 or (v >= 1 and v == int(v))),
    )
    weight_decay: float = _opt(0.0, "Decoupled weight decay.", ZERO_OR_MORE)
    adam_beta1: float = _opt(0.9, "Decay of AdamW's mean.", DECAY)
    adam_beta2: float = _opt(0.999, "Decay of AdamW's squared mean.", DECAY)
    adam_epsilon: float = _opt(1e-8, "AdamW's epsilon.", ABOVE_ZERO)
    max_grad_norm: float = _opt(1.0, "Clip the gradient to this norm; 0: no clipping.", ZERO_OR_MORE)
    gradient_checkpointing: bool = _opt(True, "Recompute layers in the backward pass to save memory.")
    micro_batches: int = _opt(
        0, "Split an update's rows to save memory, same result; 0: as memory needs.", ZERO_OR_MORE
    )

    cold_start: bool = _opt(False, "Fine-tune on gold calls before GRPO.")
    sft_max_steps: int = _opt(300, "Updates of the cold start at most.", ONE_OR_MORE)
    sft_batch_size: int = _opt(32, "Rows per update of the cold start.", ONE_OR_MORE)
    sft_learning_rate: float = _opt(1e-5, "Learning rate of the cold start.", ABOVE_ZERO)
    sft_eval_steps: int = _opt(10, "Updates between looks at the validation rows.", ONE_OR_MORE)
    sft_validation_size: int = _opt(128, "Training rows kept for validation.", ONE_OR_MORE)
    sft_stop_match: float = _opt(0.95, "Stop at this exact_answer_match on the validation rows.", SHARE)

    mesh_data: int = _opt(
        -1,
        "Devices along data; -1: all that are left.",
        ("-1 or >= 1", lambda v: v == -1 or v >= 1),
    )
    mesh_fsdp: int = _opt(1, "Devices that share rows and weights.", ONE_OR_MORE)
    mesh_tensor: int = _opt(1, "Devices that share a layer's heads and width.", ONE_OR_MORE)

    output_dir: str = _opt("trainer_output", "Folder of the results.")
    overwrite_output_dir: bool = _opt(False, "Start over where output_dir holds a run.")
    save_strategy: str = _opt(
        "steps",
        "When to save a checkpoint.",
        choices=("steps", "epoch", "no"),
        spellings={"false": "no"},  # YAML reads a bare no as false
    )
    save_steps: int = _opt(500, "Updates between checkpoints.", ONE_OR_MORE)
    save_total_limit: int | None = _opt(None, "Newest checkpoints to keep; unset: all.", ONE_OR_MORE)
    resume_from_checkpoint: str | None = _opt(
        None, "Folder of a step, or none for a fresh start; unset: the newest in output_dir.", keeps_none=True
    )
    logging_steps: int = _opt(10, "Updates between printed lines.", ONE_OR_MORE)
    log_completions: bool = _opt(False, "Print sample conversations at these lines.")
    report_to: str = _opt("none", "Tracker besides metrics.jsonl.", choices=("none", *PACKAGES))
    eval_steps: int | None = _opt(
        None, "Updates between evaluations; unset: before and after only.", ONE_OR_MORE
    )
    eval_batch_size: int = _opt(128, "Rows evaluated at once.", ONE_OR_MORE)
    seed: int = _opt(42, "Seed of everything random.", ("in [0, 2**32 - 1]", lambda v: 0 <= v < 2**32))
    log_level: str = _opt(
        "info",
        "How much is printed.",
        choices=("debug", "info", "warning"),
        spellings={"passive": "info", "error": "warning", "critical": "warning"},
    )
    check: bool = _opt(False, "Load everything, run the gold calls, score three conversations, and exit.")
    plan: str | None = _opt(
        None, "Print what a step needs on v5e-8, v6e-8, v5p-64, h200, cpu or BYTES x DEVICES, and exit."
    )
    print_config: bool = _opt(False, "Show every option and where it came from.")
    compilation_cache_dir: str | None = _opt(
        "~/.cache/grpo_jax/xla", "Folder of compiled programs; none turns it off.", keeps_none=True
    )

    def __post_init__(self):
        for name in OPTIONS:
            object.__setattr__(self, name, check_option(name, getattr(self, name)))
        rewards = self.reward_fn or self.reward_function_name or ["accuracy"]
        if self.reward_weights is not None and len(self.reward_weights) != len(rewards):
            raise ValueError(
                f"reward_weights needs one weight per reward function: {len(rewards)} functions "
                f"({', '.join(rewards)}), got {self.reward_weights}"
            )
        _check_loss(self)

    def batch_size(self, devices: int) -> int:
        """Completions per update: B = per device × devices × accumulation.

        Args:
            devices: devices along data and fsdp together.

        Raises:
            ValueError: when B does not divide by num_generations; names the nearest values that do.
        """
        per_step, steps = self.per_device_train_batch_size * devices, self.gradient_accumulation_steps
        size, group = per_step * steps, self.num_generations
        if size % group == 0:
            return size
        unit = group // math.gcd(per_step, group)
        below = steps // unit * unit
        valid_steps = [s for s in (below, below + unit) if s > 0]
        divisors = [g for g in range(2, size + 1) if size % g == 0]
        nearest = sorted(sorted(divisors, key=lambda g: abs(g - group))[:2])
        raise ValueError(
            f"completions per update must divide by num_generations {group}, got {size} = "
            f"per_device_train_batch_size {self.per_device_train_batch_size} × {devices} devices × "
            f"gradient_accumulation_steps {steps}; nearest valid: gradient_accumulation_steps "
            f"{_or(valid_steps)}" + (f", or num_generations {_or(nearest)}" if nearest else "")
        )

    def warmup_updates(self, total: int) -> int:
        """Updates of warm-up in a run of `total` updates, as transformers counts them."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(total * self.warmup_steps)

    def required(self, name: str) -> str:
        """The value of an option that this command cannot do without.

        Raises:
            ValueError: when it is not set.
        """
        if getattr(self, name) is None:
            raise ValueError(f"{name} must be set: --{name} VALUE, or {name}: VALUE in the YAML file")
        return getattr(self, name)


OPTIONS = {field.name: field for field in dataclasses.fields(Config)}

# The first option of each group, for --help and the resolved config.
GROUPS = {
    "tools_script": "tools",
    "reward_fn": "rewards",
    "dataset_id_or_path": "data",
    "model_name_or_path": "model",
    "use_peft": "LoRA",
    "num_train_epochs": "GRPO",
    "learning_rate": "optimiser",
    "cold_start": "cold start",
    "mesh_data": "mesh",
    "output_dir": "run",
}


def _check_loss(config: Config) -> None:
    """Refuse an option of the loss or the advantages that the others leave without effect or meaning."""
    loss, default = config.loss_type, {name: field.default for name, field in OPTIONS.items()}
    clipped = loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
    belongs = {
        "epsilon": (clipped, "a loss_type with a lower clip (not cispo, sapo or vespo)"),
        "epsilon_high": (clipped or loss == "cispo", "a loss_type with an upper clip (not sapo or vespo)"),
        "delta": (clipped, "a clipped loss_type (not cispo, sapo or vespo)"),
        **{name: (loss == "sapo", "loss_type sapo") for name in OPTIONS if name.startswith("sapo_")},
        **{name: (loss == "vespo", "loss_type vespo") for name in OPTIONS if name.startswith("vespo_")},
    }
    for name, (acts, needs) in belongs.items():
        if not acts and getattr(config, name) != default[name]:
            raise ValueError(
                f"{name} {getattr(config, name)} has no effect with loss_type {loss}: it needs {needs}"
            )
    if loss == "luspo" and config.importance_sampling_level != "sequence":
        raise ValueError(
            "loss_type luspo weighs a sequence's ratio by its length; set importance_sampling_level to sequence"
        )
    if loss == "vespo" and config.importance_sampling_level == "sequence" and not config.beta:
        raise ValueError(
            "importance_sampling_level sequence has no effect with loss_type vespo, whose ratio is the "
            "sequence's already; leave it out"
        )
    if config.sampler_correction == "none":
        for name in ("sampler_correction_min", "sampler_correction_max"):
            if getattr(config, name) != default[name]:
                raise ValueError(f"{name} {getattr(config, name)} has no effect without sampler_correction")
    if config.sampler_correction.endswith("truncate") and (
        config.sampler_correction_min is None and config.sampler_correction_max is None
    ):
        raise ValueError(
            f"sampler_correction {config.sampler_correction} needs sampler_correction_min or _max to cut at"
        )
    if config.multi_objective_aggregation == "normalize_then_sum":
        for name in ("scale_rewards", "advantage_estimator"):
            if getattr(config, name) != "group":
                raise ValueError(
                    f"{name} {getattr(config, name)} has no effect with multi_objective_aggregation "
                    "normalize_then_sum, which scales each reward by its group and their sum by the batch; "
                    "leave it out"
                )
    if config.advantage_estimator == "none" and config.scale_rewards != "none":
        raise ValueError(
            f"advantage_estimator none with scale_rewards {config.scale_rewards} would divide rewards by a "
            "deviation of 0 where they are equal; set scale_rewards to none"
        )


def compute_dtype(option: str, on_cpu: bool) -> str:
    """The type of the computation that the option `dtype` means on a device."""
    return ("float32" if on_cpu else "bfloat16") if option == "auto" else option


@functools.cache
def option_type(name: str) -> tuple[type, type | None, bool]:
    """The type of an option, the type of a list's items, and whether it may be None."""
    hint = typing.get_type_hints(Config)[name]
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is list:
        return list, typing.get_args(hint)[0], optional
    return hint, None, optional


def check_option(name: str, value: Any) -> Any:
    """The value of one option in its type, after its choices and rule were checked.

    Args:
        name: a field of Config.
        value: of the right type, or text that reads as it.

    Raises:
        ValueError: when it is neither, or breaks the option's rule.
    """
    kind, item, optional = option_type(name)
    meta = OPTIONS[name].metadata
    value = meta.get("spellings", {}).get(str(value).lower(), value)
    if optional and (value is None or (_says_none(value) and not meta.get("keeps_none"))):
        return None
    try:
        value = _read_list(item, value) if kind is list else _READ[kind](value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be {type_name(name)}, got {value!r}") from None
    for one in value if kind is list else [value]:
        if "choices" in meta and one not in meta["choices"]:
            close = difflib.get_close_matches(str(one), meta["choices"], n=1)
            nearest = f"; nearest: {close[0]}" if close else ""
            raise ValueError(f"{name} must be one of {', '.join(meta['choices'])}, got {one!r}{nearest}")
    if meta["rule"] and not meta["rule"][1](value):
        raise ValueError(f"{name} must be {meta['rule'][0]}, got {value!r}")
    return value


def _says_none(value: Any) -> bool:
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    return str(word).lower() in ("none", "null")


def _read_bool(value: Any) -> bool:
    if str(value).lower() in ("true", "false") and isinstance(value, bool | str):
        return str(value).lower() == "true"
    raise ValueError


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError
    return int(value)


def _read_float(value: Any) -> float:
    # PyYAML reads 5e-7 (no dot) as text, so text that is a number is one.
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _read_str(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _read_dict(value: Any) -> dict:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError
    return dict(value)


def _read_list(item: type, value: Any) -> list:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError
    return [_READ[item](one) for one in values]


_READ = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str, dict: _read_dict}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "JSON"}


def type_name(name: str) -> str:
    """What an option's value must be, in words, for errors and --help."""
    kind, item, optional = option_type(name)
    text = "one or more of: " + _NAMES[item] if kind is list else _NAMES[kind]
    return text + (" (or none)" if optional else "")


def _or(values: list) -> str:
    return " or ".join(map(str, values))
