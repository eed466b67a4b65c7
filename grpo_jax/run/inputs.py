"""Checks of rows against the model and the options, and the chat template, before anything compiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from grpo_jax.data.gold import gold_calls
from grpo_jax.models.cache import with_template
from grpo_jax.models.scratch import CHAT_TEMPLATE
from grpo_jax.types import Prompt

HERMES = "hermes"


def templated(folder: Path, chat_template: str | None) -> Path:
    """A folder with a tokenizer, with the chat template that the option names in place of its own.

    Args:
        chat_template: a file, or "hermes", the template of new small models; None for the folder's own.

    Raises:
        ValueError: the file cannot be read.
    """
    if chat_template is None:
        return folder
    if chat_template == HERMES:
        return with_template(folder, CHAT_TEMPLATE)
    try:
        return with_template(folder, Path(chat_template).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"chat_template must be {HERMES} or a text file, and {chat_template} cannot be read: {why}"
        ) from None


def check_context(prompts: Sequence[Prompt], budget: int, positions: int | None) -> None:
    """Whether every prompt and its completion fit into the model's positions.

    Args:
        prompts: at least one.
        budget: max_grpo_completion_length, tokens after the prompt at most.
        positions: `ModelConfig.positions`; None for a model that names no limit.

    Raises:
        ValueError: the longest prompt and the budget are more than that.
    """
    longest = max(prompts, key=lambda p: len(p.ids))
    tokens = len(longest.ids)
    if positions is None or tokens + budget <= positions:
        return
    room = positions - tokens
    fixes = [f"lower max_grpo_completion_length to at most {room}"] if room > 0 else []
    if min(len(p.ids) for p in prompts) + budget <= positions:
        fixes.append(
            f"drop longer prompts with max_prompt_length {positions - budget}, overlong_prompts drop"
        )
    fixes.append("choose a model with a longer context, or add YaRN to its config.json (rope_scaling)")
    raise ValueError(
        f"{longest.example.source}: the longest prompt has {tokens} tokens, which with "
        f"max_grpo_completion_length {budget} makes {tokens + budget}; the model was made for {positions} positions "
        f"(max_position_embeddings in its config.json, times the factor of YaRN): {'; or '.join(fixes)}"
    )


def check_stop_rule(prompts: Sequence[Prompt], sft_stop_match: float) -> None:
    """Whether the rows that the cold start holds out have the figure by which it stops.

    Raises:
        ValueError: every answer is an `Error:`, and such rows have no exact_answer_match.
    """
    if all(p.example.wants_error for p in prompts):
        raise ValueError(
            f"{prompts[0].example.source}: the answers of all {len(prompts)} validation rows (the last "
            "sft_validation_size of the training rows) begin with 'Error:', so that they have no "
            f"exact_answer_match to stop the cold start by (sft_stop_match {sft_stop_match}); put rows with other "
            "answers at the end of the file, or raise sft_validation_size"
        )


def check_compared_figure(prompts: Sequence[Prompt], functions: Mapping[str, Callable], figure: str) -> None:
    """Whether evaluation rows have the figure by which evaluations are compared (`early_stop_metric`).

    Raises:
        ValueError: every answer is an `Error:`, or no row has a gold call to compare with.
    """
    rows = [p for p in prompts if not p.example.wants_error]
    if figure == "tool_call_schema_match":
        rows = [p for p in rows if gold_calls(p.example, functions)]
    if not rows:
        raise ValueError(
            f"{prompts[0].example.source}: none of the {len(prompts)} evaluation rows has a {figure}, by which "
            "early_stop_metric compares evaluations: their answers begin with 'Error:', or they lack gold calls; "
            "choose another early_stop_metric or other rows"
        )


def check_gold_calls(prompts: Sequence[Prompt], functions: Mapping[str, Callable]) -> None:
    """Whether the gold calls of evaluation rows, where there are any, can be compared with.

    Raises:
        ValueError: see `gold_calls`.
    """
    for prompt in prompts:
        gold_calls(prompt.example, functions)
