"""The options: their types, defaults, help and the values that each may have.

Names, meanings and defaults are those of TRL 1.16's GRPOConfig where the option
exists there, and of the original TRL recipe's arguments otherwise. Three depart from TRL: `dtype`
(auto), `eval_strategy` and `log_level`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass


def _opt(
    default: Any, description: str, *, path: str = "", why: str = "", spellings=None, **bounds: Any
) -> Any:
    """A field of an option.

    Args:
        default: a dict stands for a new copy of it each time.
        path: what it names: a `file`, `data` or a `model`; see `GRPOConfig.with_absolute_paths`.
        why: follows a bound in errors.
        spellings: other forms of values, in lower case -> the value.
        bounds: pydantic's ge, gt, le, lt.
    """
    extra = {"path": path, "why": why, "spellings": spellings or {}}
    given = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return Field(**given, description=description, json_schema_extra=extra, **bounds)


def _rule(text: str, holds: typing.Callable[[Any], bool]) -> AfterValidator:
    """A check that pydantic does not provide; `text` says in an error what the value must be."""

    def check(value):
        if not holds(value):
            raise ValueError(text)
        return value

    return AfterValidator(check)


def _interval(value: float) -> float:
    if 0 < value < 1:
        return value
    if value < 1 or value != int(value):
        raise ValueError("a whole number of updates, or a fraction of all updates between 0 and 1")
    return int(value)


def _schedule_arguments(given: dict) -> dict:
    """Without nulls, which stand for a default; PyYAML reads 1e-6 as text."""

    def number(value: typing.Any) -> typing.Any:
        with contextlib.suppress(TypeError, ValueError):
            return float(value) if isinstance(value, str) else value
        return value

    return {name: number(value) for name, value in given.items() if value is not None}


Interval = Annotated[float, AfterValidator(_interval)]
Unlimited = Annotated[int, _rule("-1 or >= 1", lambda v: v == -1 or v >= 1)]
Seed = Annotated[int, _rule("in [0, 2**32 - 1]", lambda v: 0 <= v < 2**32)]
WarmUp = Annotated[
    float, _rule(">= 0, and whole from 1 on", lambda v: 0 <= v < 1 or (v >= 1 and v == int(v)))
]
FileSize = Annotated[
    str,
    _rule(
        "a number above 0 and its unit KB, MB, GB or TB, as 5GB or 500MB",
        lambda v: re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", v, re.IGNORECASE) is not None,
    ),
]
ColumnNames = Annotated[
    dict,
    _rule(
        'column names, as {"prompt": "question"}',
        lambda v: all(name and isinstance(name, str) for pair in v.items() for name in pair),
    ),
]
FloatType = Literal["float32", "bfloat16"]
LoraModule = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear"
]
Figure = Literal[
    "response_validity", "exact_answer_match", "tool_call_schema_match", "turn_closed", "answer_grounded"
]
DEFAULT_TOOLS = "tools_funcs.financial_tools_complex"  # the original's
NONE_IS_A_VALUE = {"resume_from_checkpoint", "compilation_cache_dir"}  # elsewhere the text none unsets


@dataclass(frozen=True, kw_only=True, config=ConfigDict(allow_inf_nan=False))
class Options:
    """The fields of `GRPOConfig`, of which pydantic checks each value by itself."""

    tools_script: str | None = _opt(
        None,
        "Python file that exports TOOL_FUNCTIONS; takes precedence over tool_functions_module.",
        path="file",
    )
    tool_functions_module: str = _opt(DEFAULT_TOOLS, "Python module that exports TOOL_FUNCTIONS.")
    tool_executor: Literal["process", "inline"] = _opt(
        "process", "Run tools in worker processes, or inline in the main process."
    )
    tool_timeout: float = _opt(5.0, "Time limit of a tool call, in seconds.", gt=0)
    tool_memory_limit: int = _opt(1024, "Memory limit of a tool worker, in MB.", ge=1)
    tool_result_limit: int = _opt(
        20_000, "Maximum length of a tool's result in characters; a longer one becomes an error.", ge=1
    )
    tool_env: list[str] | None = _opt(
        None,
        "Environment variables passed to tool workers in addition to the default ones, as NAME or NAME_*.",
    )
    tool_sandbox: Literal["none", "unshare", "bubblewrap"] = _opt(
        "none",
        "unshare: workers without network or view of other processes; bubblewrap: also with read-only files.",
    )
    tool_cache: bool = _opt(True, "Reuse the result of an identical tool call within a step.")
    verify_purity: bool = _opt(
        False, "Run up to 8 calls of each training step twice and report tools whose results differ."
    )
    tool_arg_validation: Literal["strict", "lax"] = _opt(
        "strict", "lax accepts numbers written as text in tool arguments; strict rejects them."
    )
    max_tool_calling_iterations: int | None = _opt(
        None,
        "Maximum number of tool turns in a conversation; unset: only the token budget limits them.",
        ge=1,
    )
    stop_after_tools: bool = _opt(
        False, "End a completion after the results of its first tool turn, without a final text."
    )
    final_tool: str | None = _opt(
        None,
        "Tool whose call ends a conversation with its argument as the answer, in addition to those marked @final.",
    )
    malformed_call_feedback: bool = _opt(
        False, "Send the parse error to the model as a tool response when a tool call does not parse."
    )

    reward_fn: list[str] | None = _opt(
        None,
        "Python files that export reward_func, or built-in names; takes precedence over reward_function_name.",
        path="file",
    )
    reward_function_name: list[str] | None = _opt(None, "Built-in reward functions; unset: accuracy.")
    reward_weights: list[float] | None = _opt(None, "One weight per reward function; unset: all 1.")
    turn_advantage_coef: float = _opt(
        1.0, "Weight of a turn's own advantage, from rewards that return one number per turn.", ge=0
    )
    malformed_call_penalty: float = _opt(
        0.0, "Subtracted from the advantage of the tokens of a tool call that does not parse.", ge=0
    )
    failed_call_penalty: float = _opt(
        0.0, "Subtracted from the advantage of the tokens of a tool call whose result is an error.", ge=0
    )
    soft_overlong_cache: int | None = _opt(
        None,
        "Length penalty that grows from 0 to 1 over the last N tokens before the maximum length; unset: none.",
        ge=1,
    )
    soft_overlong_penalty: float = _opt(
        1.0,
        "Weight of the penalty of soft_overlong_cache, which is logged as the reward soft_overlong.",
        gt=0,
    )

    dataset_id_or_path: str | None = _opt(
        None,
        "Training data: a file (JSONL, CSV, Parquet, ...), tfds:NAME, or a hub data set OWNER/NAME.",
        path="data",
    )
    eval_dataset_id_or_path: str | None = _opt(
        None, "Evaluation data, in the same forms as dataset_id_or_path.", path="data"
    )
    dataset_columns: ColumnNames = _opt(
        {}, 'Column names of both data sets, name here to name in the data, as {"prompt": "question"}.'
    )
    system_prompt: str | None = _opt(None, "System message for prompts that have none.")
    max_prompt_length: int | None = _opt(
        None, "Maximum length of a prompt in tokens; unset: the longest prompt of the data.", ge=1
    )
    overlong_prompts: Literal["error", "drop"] = _opt(
        "error", "What to do with prompts longer than max_prompt_length."
    )

    model_name_or_path: str | None = _opt(
        None,
        "Model folder, GGUF file or hub id; scratch: a new small model with its own tokenizer.",
        path="model",
    )
    model_revision: str = _opt("main", "Branch, tag or commit of a hub model.", spellings={"none": "main"})
    tokenizer_name_or_path: str | None = _opt(
        None, "Tokenizer folder or hub id, exported with the model; unset: the model's own.", path="model"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _opt(
        "auto", "Data type of the computation; auto: float32 on CPUs, bfloat16 on accelerators."
    )
    param_dtype: FloatType = _opt("float32", "Data type of the trained weights.")
    optim_dtype: FloatType = _opt("float32", "Data type of the moments of AdamW and Lion.")
    max_shard_size: FileSize = _opt("5GB", "Maximum size of one weight file of a saved model.")
    chat_template: str | None = _opt(
        None,
        "Chat template in place of the model's: a Jinja file, or hermes, which supports tools.",
        path="model",
    )
    chat_template_kwargs: dict = _opt(
        {}, 'Arguments passed to the chat template, as {"enable_thinking": false}.'
    )

    use_peft: bool = _opt(False, "Train LoRA adapters instead of all weights.")
    lora_r: int = _opt(16, "Rank of the LoRA adapters.", ge=1)
    lora_alpha: float = _opt(32.0, "LoRA alpha: the adapters' output is scaled by alpha / r.", gt=0)
    use_rslora: bool = _opt(False, "Scale the adapters' output by alpha / sqrt(r) instead (rsLoRA).")
    lora_dropout: float = _opt(0.05, "Dropout on the adapters' input during updates.", ge=0, lt=1)
    lora_target_modules: list[LoraModule] | None = _opt(
        None,
        "Modules that get adapters; all-linear: every linear layer; unset: q_proj and v_proj, as in PEFT.",
    )

    num_train_epochs: float = _opt(3.0, "Passes over the training data.", gt=0)
    max_steps: Unlimited = _opt(-1, "Number of updates; -1: as many as num_train_epochs implies.")
    per_device_train_batch_size: int = _opt(
        8, "Completions per accumulation step and device (along the data and fsdp axes).", ge=1
    )
    gradient_accumulation_steps: int = _opt(1, "Accumulation steps per update.", ge=1)
    generation_batch_size: int | None = _opt(
        None,
        "Completions per update; if set, it must equal per device × devices × accumulation steps.",
        ge=1,
    )
    num_generations: int = _opt(
        8, "Completions per prompt, which form a group.", ge=2, why="to rank completions"
    )
    max_grpo_completion_length: int = _opt(
        512, "Maximum length of a completion in tokens, tool responses included.", ge=1
    )
    max_turn_length: int | None = _opt(
        None,
        "Maximum length of one model turn in tokens; a longer one ends the completion; unset: none.",
        ge=1,
    )
    mask_truncated_completions: bool = _opt(
        False, "Exclude completions that the budget ended (overlong, overlong_tool_response) from the loss."
    )
    temperature: float = _opt(1.0, "Sampling temperature.", gt=0)
    top_p: float = _opt(1.0, "Sample from the most likely tokens with this total probability.", gt=0, le=1)
    top_k: int = _opt(
        0, "Sample from this many most likely tokens; 0: from all.", ge=0, spellings={"-1": 0, "none": 0}
    )
    min_p: float | None = _opt(
        None, "Sample from tokens with at least this fraction of the highest probability.", ge=0, le=1
    )
    beta: float = _opt(
        0.0, "Weight of the KL divergence from the initial model; 0: no reference model.", ge=0
    )
    use_bias_correction_kl: bool = _opt(
        True, "Multiply each token's KL divergence by its importance ratio, as TRL does."
    )
    epsilon: float = _opt(0.2, "Lower clipping bound of the importance ratio: 1 - epsilon.", gt=0)
    epsilon_high: float | None = _opt(
        None,
        "Upper clipping bound of the ratio: 1 + epsilon_high (cispo: epsilon_high itself); unset: epsilon.",
        gt=0,
    )
    delta: float | None = _opt(
        None,
        "Upper bound of the ratio where the advantage is negative; unset: none.",
        gt=1,
        why="(an unchanged policy has the ratio 1)",
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = _opt(
        "dapo", "Loss per token, and how token losses are averaged."
    )
    sapo_temperature_pos: float = _opt(1.0, "loss_type sapo: temperature where the advantage is > 0.", gt=0)
    sapo_temperature_neg: float = _opt(1.05, "loss_type sapo: temperature elsewhere.", gt=0)
    vespo_k_pos: float = _opt(2.0, "loss_type vespo: exponent where the advantage is >= 0.", ge=0)
    vespo_lambda_pos: float = _opt(3.0, "loss_type vespo: decay where the advantage is >= 0.", ge=1e-4)
    vespo_k_neg: float = _opt(3.0, "loss_type vespo: exponent elsewhere.", ge=0)
    vespo_lambda_neg: float = _opt(2.0, "loss_type vespo: decay elsewhere.", ge=1e-4)
    entropy_coef: float = _opt(
        0.0, "Weight of the entropy bonus, the mean entropy that is subtracted from the loss."
    )
    off_policy_mask_threshold: float | None = _opt(
        None,
        "Exclude completions with negative advantage whose mean log-probability has fallen by more than this.",
        gt=0,
    )
    sampler_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = _opt(
        "none",
        "Weight by trainer over sampler probability, truncated at its bounds or masked outside them.",
    )
    sampler_correction_min: float | None = _opt(
        None, "Lower bound of the weight of sampler_correction; unset: none.", ge=0, le=1
    )
    sampler_correction_max: float | None = _opt(
        3.0, "Upper bound of the weight of sampler_correction; none: no bound.", ge=1
    )
    scale_rewards: Literal["group", "batch", "none"] = _opt(
        "group",
        "Divide advantages by the standard deviation of the group, of the batch, or not at all.",
        spellings={"true": "group", "false": "none"},  # TRL's older form
    )
    importance_sampling_level: Literal["token", "sequence"] = _opt(
        "token", "One importance ratio per token, or one per sequence."
    )
    top_entropy_quantile: float = _opt(
        1.0, "Fraction of a batch's sampled tokens that enter the loss, those of highest entropy.", gt=0, le=1
    )
    num_iterations: int = _opt(1, "Updates per batch of completions.", ge=1)
    dynamic_sampling: bool = _opt(
        False, "Replace groups with zero advantage (all rewards equal) by groups of the next prompts."
    )
    dynamic_sampling_max_rounds: int = _opt(
        4, "Maximum number of rollouts per batch with dynamic_sampling.", ge=2, why="to replace any group"
    )
    difficulty_sampling: bool = _opt(
        False, "Sample prompts more often the closer the solve rate of their last group is to 0.5."
    )
    difficulty_floor: float = _opt(
        0.1,
        "Minimum weight of a prompt with difficulty_sampling; at a solve rate of 0.5 the weight is 1.",
        gt=0,
        le=1,
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = _opt(
        "sum_then_normalize", "Normalize the sum of the rewards, or sum the normalized rewards (GDPO)."
    )
    advantage_estimator: Literal["group", "loo", "none"] = _opt(
        "group", "Baseline of a reward: the mean of its group, the mean of the others in its group, or 0."
    )

    learning_rate: float = _opt(1e-6, "Peak learning rate.", ge=0)
    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = _opt("linear", "Learning rate schedule after the warm-up.")
    lr_scheduler_kwargs: Annotated[dict, AfterValidator(_schedule_arguments)] = _opt(
        {}, 'Arguments of the schedule, as {"min_lr_rate": 0.1}.'
    )
    warmup_steps: WarmUp = _opt(0.0, "Number of warm-up updates; below 1: a fraction of all updates.")
    warmup_ratio: float | None = _opt(
        None, "Fraction of all updates used for warm-up if warmup_steps is 0.", ge=0, le=1
    )
    optim: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = _opt(
        "adamw",
        "Optimizer; adafactor and sgd keep no full-size moments, lion one, muon one of most weights.",
        why="(moments are kept in optim_dtype, float32 or bfloat16)",
        spellings={
            **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_hf"), "adamw"),
            **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "adamw"),
            **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), "lion"),
        },
    )
    weight_decay: float = _opt(
        0.0, "Weight decay, scaled by the learning rate; not applied to norms and biases.", ge=0
    )
    adam_beta1: float = _opt(0.9, "AdamW, Lion and Muon's AdamW: decay rate of the first moment.", ge=0, lt=1)
    adam_beta2: float = _opt(
        0.999, "AdamW and Muon's AdamW: decay rate of the second moment; Lion: of its only one.", ge=0, lt=1
    )
    adam_epsilon: float = _opt(1e-8, "AdamW: constant added to the denominator.", gt=0)
    max_grad_norm: float = _opt(1.0, "Clip the gradient to this norm; 0: no clipping.", ge=0)
    gradient_checkpointing: bool = _opt(True, "Recompute activations in the backward pass to save memory.")
    micro_batches: int = _opt(
        0, "Micro-batches per update, which do not change the result; 0: as few as memory allows.", ge=0
    )

    cold_start: bool = _opt(False, "Fine-tune on gold calls before GRPO.")
    sft_max_steps: int = _opt(300, "Maximum number of updates of the cold start.", ge=1)
    sft_batch_size: int = _opt(32, "Rows per update of the cold start.", ge=1)
    sft_learning_rate: float = _opt(1e-5, "Learning rate of the cold start.", gt=0)
    sft_eval_steps: int = _opt(
        10, "Updates of the cold start between evaluations on the validation rows.", ge=1
    )
    sft_validation_size: int = _opt(128, "Number of training rows held out for validation.", ge=1)
    sft_stop_match: float = _opt(
        0.95, "exact_answer_match on the validation rows at which the cold start stops.", gt=0, le=1
    )
    sft_stop_reward: float | None = _opt(
        None,
        "Mean reward of sampled validation rows at which the cold start stops, in place of sft_stop_match.",
    )
    sft_weights: Literal["tokens", "turns"] = _opt(
        "tokens", "Weight every token, or every turn of a row, equally in the loss of the cold start."
    )
    sft_stop_grounded: float = _opt(
        0.0,
        "answer_grounded on the validation rows that is also required to stop the cold start.",
        ge=0,
        le=1,
    )

    mesh_data: Unlimited = _opt(-1, "Devices along the data axis; -1: all remaining ones.")
    mesh_fsdp: int = _opt(1, "Devices over which batches and weights are sharded.", ge=1)
    mesh_tensor: int = _opt(1, "Devices over which the heads and widths of layers are sharded.", ge=1)

    output_dir: str = _opt(
        "trainer_output", "Folder for the results; in training also a URL, as gs://bucket/name.", path="file"
    )
    overwrite_output_dir: bool = _opt(False, "Delete the run that output_dir holds and start over.")
    save_strategy: Literal["steps", "epoch", "no"] = _opt(
        "steps",
        "When to save checkpoints during training.",
        spellings={"false": "no"},  # YAML reads a bare no as false
    )
    save_steps: Interval = _opt(
        500, "Updates between checkpoints, of a cold start too; below 1: a fraction of all updates."
    )
    save_total_limit: int | None = _opt(
        None, "Number of newest checkpoints to keep, in addition to the best one; unset: all.", ge=1
    )
    resume_from_checkpoint: str | None = _opt(
        None,
        "Checkpoint folder to resume from; none: start fresh; unset: the newest in output_dir.",
        path="file",
        spellings={"true": None, "false": "none"},
    )
    allow_config_change: bool = _opt(
        False, "Resume even if data, tools, rewards, seed or batch size differ from the checkpoint's."
    )
    logging_steps: Interval = _opt(10, "Updates between printed lines; below 1: a fraction of all updates.")
    log_completions: bool = _opt(False, "Print sample conversations with the lines of logging_steps.")
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = _opt(
        "none", "Experiment tracker to which the metrics are also sent."
    )
    eval_strategy: Literal["no", "steps", "epoch"] | None = _opt(
        None,
        "When to evaluate during training; unset: every eval_steps updates, if that is set.",
        spellings={"false": "no"},
    )
    eval_steps: Interval | None = _opt(
        None,
        "Updates between evaluations; below 1: a fraction of all; unset: only before and after training.",
    )
    early_stop_patience: int | None = _opt(
        None,
        "Stop after this many evaluations without a better early_stop_metric; unset: never.",
        ge=1,
    )
    early_stop_metric: Figure = _opt("exact_answer_match", "Figure by which evaluations are compared.")
    load_best_model_at_end: bool = _opt(
        False, "Export the weights of the best evaluation instead of the last ones."
    )
    eval_batch_size: int = _opt(128, "Rows evaluated at once.", ge=1)
    eval_samples: int | None = _opt(
        None,
        "Samples per evaluated row, for mean@K and pass@k in addition to the greedy figures; unset: none.",
        ge=2,
    )
    seed: Seed = _opt(42, "Seed of all randomness.")
    shuffle_dataset: bool = _opt(
        True, "Shuffle the training rows in every epoch; false: keep the order of the data."
    )
    log_level: Literal["debug", "info", "warning"] = _opt(
        "info",
        "How much is printed.",
        spellings={"passive": "info", "error": "warning", "critical": "warning"},
    )
    check: bool = _opt(False, "Load everything, run the gold calls, score sample conversations, and exit.")
    plan: str | None = _opt(
        None, "Estimate a step on v5e-8, v6e-8, v5p-64, h200, cpu or BYTES x DEVICES, and exit."
    )
    print_config: bool = _opt(False, "Print every option with its value and origin, and exit.")
    compilation_cache_dir: str | None = _opt(
        "~/.cache/grpo_jax/xla", "Folder of the persistent compilation cache; none: no cache.", path="file"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: Any) -> Any:
        """The value in a form that pydantic reads, from a YAML file, a flag's text or a Python call."""
        name = info.field_name
        kind, _, is_list, optional = option_type(name)
        word = str(
            value[0] if is_list and isinstance(value, list | tuple) and len(value) == 1 else value
        ).lower()
        spellings = OPTIONS[name].json_schema_extra["spellings"]
        if word in spellings:
            return spellings[word]
        if word in ("none", "null") and name not in NONE_IS_A_VALUE and (optional or kind is dict):
            value = None
        if value is None:
            return {} if kind is dict else None
        values = [_plain(kind, one) for one in (value if isinstance(value, list | tuple) else [value])]
        if is_list:
            if not values:
                raise ValueError(f"one or more values ({KINDS[kind]})")
            return values
        return values[0] if not isinstance(value, list | tuple) else value


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a JSON object",
}
OPTIONS: dict[str, Any] = vars(Options)["__pydantic_fields__"]  # name -> pydantic's FieldInfo

# The first option of each group, for --help and the resolved config.
GROUPS = {
    "tools_script": "tools",
    "reward_fn": "rewards",
    "dataset_id_or_path": "data",
    "model_name_or_path": "model",
    "use_peft": "LoRA",
    "num_train_epochs": "GRPO",
    "learning_rate": "optimizer",
    "cold_start": "cold start",
    "mesh_data": "mesh",
    "output_dir": "run",
}


def _plain(kind: type, value: Any) -> Any:
    """One value as pydantic's lax mode should see it: no number for a switch and none the other way round."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    text = isinstance(value, str)
    if kind is bool and not isinstance(value, bool) and not (text and value.lower() in ("true", "false")):
        raise ValueError(KINDS[bool])
    if kind in (int, float) and isinstance(value, bool):
        raise ValueError(KINDS[kind])
    if kind is str and not value:
        raise ValueError(KINDS[str])
    if kind is dict and text:
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(KINDS[dict]) from None
    return value


class OptionType(typing.NamedTuple):
    """What an option holds: values of a kind, one or a list of them, or None; `choices` lists them where they are few."""

    kind: type
    choices: tuple[str, ...]
    is_list: bool
    optional: bool


@functools.cache
def option_type(name: str) -> OptionType:
    """The type of an option, read off its annotation."""
    kind, choices, is_list, optional = str, (), False, False
    hints = [OPTIONS[name].annotation]
    for hint in hints:  # which grows
        is_list |= typing.get_origin(hint) is list
        optional |= hint is types.NoneType
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
        elif hint in KINDS:
            kind = hint
        else:
            hints += [one for one in typing.get_args(hint) if not isinstance(one, AfterValidator)]
    return OptionType(kind, choices, is_list, optional)
