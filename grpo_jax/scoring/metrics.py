"""Metrics of a batch of completions, under TRL's names where TRL has them, and a hint when no tool is called."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from grpo_jax.scoring.grounding import trajectory_grounded
from grpo_jax.text import shorten
from grpo_jax.types import Outcome, Status, Trajectory

# Every metric of metrics.jsonl and what it is; `python scripts/make_docs.py` writes docs/metrics.md from this table.
# NAME is a reward function, STATUS a status, FIGURE a figure of an evaluation.
METRICS = {
    "step": "Updates so far, skipped ones included.",
    "reward": "Mean over all completions of the weighted sum of their rewards.",
    "reward_std": "Standard deviation of that sum over all completions.",
    "rewards/NAME/mean": "Mean of one reward function over the completions to which it applies.",
    "rewards/NAME/std": "Standard deviation of the same values.",
    "frac_reward_zero_std": "Share of groups whose completions all have the same reward, and so zero advantage.",
    "completions/mean_length": "Mean number of sampled tokens per completion; tool responses do not count.",
    "completions/min_length": "Smallest number of sampled tokens.",
    "completions/max_length": "Largest number of sampled tokens.",
    "completions/clipped_ratio": "Share of completions that the token budget ended.",
    "completions/turn_closed": "Share of completions that the model ended itself, as in an evaluation.",
    "completions/answer_grounded": "Share of completions whose final text states the last tool result, as in an "
    "evaluation.",
    "tools/call_frequency": "Tool calls per completion.",
    "tools/failure_frequency": "Share of calls that ended with an error, a timeout or a crash.",
    "tools/cache_hit_rate": "Share of calls answered from the results of equal calls (`tool_cache`).",
    "tools/impure": "Tools that returned different results for the same call (with `verify_purity`).",
    "status/STATUS": "Share of completions with this status.",
    "loss": "The loss, averaged as `loss_type` says.",
    "entropy": "Mean entropy of the policy at the sampled tokens of the update, in nats.",
    "kl": "Mean KL divergence from the reference model per sampled token, in nats (with `beta` above 0).",
    "clip_ratio/low_mean": "Share of sampled tokens clipped at 1 - epsilon (negative advantage).",
    "clip_ratio/high_mean": "Share of sampled tokens clipped at 1 + epsilon_high (positive advantage).",
    "clip_ratio/region_mean": "Sum of the two.",
    "cispo_clip_ratio": "Share of sampled tokens whose weight is clipped (with `loss_type cispo`).",
    "grad_norm": "Norm of the gradient before clipping.",
    "skipped": "1 when the loss or the gradient was not finite; such an update leaves the weights unchanged.",
    "learning_rate": "Learning rate of the update.",
    "epoch": "Passes over the training data so far.",
    "num_tokens": "Tokens of all prompts and completions so far, tool responses included.",
    "sampling/sampling_logp_difference/mean": "Mean absolute difference between the log-probabilities of sampler and "
    "trainer, in nats.",
    "sampling/sampling_logp_difference/max": "Largest such difference.",
    "rollout/wasted_decode": "Share of decode work on rows whose turn had already ended.",
    "rollout/tokens_per_pass": "Tokens that a decode pass adds to a completion whose turn has not ended: 1, or more with "
    "drafts.",
    "rollout/rounds": "Rollouts for this batch (with `dynamic_sampling`).",
    "rollout/wasted_groups": "Share of sampled groups that contribute no gradient (with `dynamic_sampling`).",
    "step_time": "Seconds for rollout, rewards and update.",
    "eval/FIGURE": "Each figure of the evaluation after this update, and `n`, its number of rows.",
}
_PREFIXES = tuple({name.split("/")[0] + "/" for name in METRICS if "/" in name})


def is_run_metric(name: str) -> bool:
    """Whether the run itself writes, or may write, a metric under this name."""
    return name in METRICS or name.startswith(_PREFIXES)


def trajectory_metrics(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[float] | np.ndarray,
    group_std: Sequence[float] | np.ndarray,
    reward_names: Sequence[str],
) -> dict[str, float]:
    """The metrics of a batch.

    `completions/*_length` count sampled tokens, without tool responses.
    `tools/call_frequency` is calls per completion, `tools/failure_frequency` failures
    per call. Deviations have Bessel's correction. `status/NAME`, `completions/turn_closed` and
    `completions/answer_grounded` are shares of the rows; the last two mean what they do in an evaluation, and are NaN where `stop_after_tools` ended all rows.

    Args:
        trajectories: [B].
        rewards: [B] what all reward functions gave together; NaN where none applies.
        group_std: [P] deviation of each group's rewards.
        reward_names: one per value of a trajectory's rewards.

    Raises:
        ValueError: when there are no trajectories.
    """
    if not trajectories:
        raise ValueError("metrics need at least one trajectory, got none")
    n = len(trajectories)
    mean, std = _mean_and_std(rewards)
    metrics = {"reward": mean, "reward_std": std}
    for k, name in enumerate(reward_names):
        mean, std = _mean_and_std([one.rewards[k] for one in trajectories])
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
    # 1e-8 is torch.isclose's tolerance around zero, which TRL uses.
    metrics["frac_reward_zero_std"] = float(np.mean(np.asarray(group_std) <= 1e-8))

    lengths = [one.sampled_tokens for one in trajectories]
    asked = [one for one in trajectories if one.status is not Status.TOOLS_DONE]  # for a final text
    metrics |= {
        "completions/mean_length": sum(lengths) / n,
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(one.status.truncated for one in trajectories) / n,
        "completions/turn_closed": _mean_and_std([one.status.closed for one in asked])[0],
        "completions/answer_grounded": _mean_and_std(list(map(trajectory_grounded, asked)))[0],
    }

    outcomes = [result.outcome for one in trajectories for _, result in one.calls]
    failures = sum(outcome is not Outcome.OK for outcome in outcomes)
    metrics["tools/call_frequency"] = len(outcomes) / n
    metrics["tools/failure_frequency"] = failures / len(outcomes) if outcomes else 0.0

    counts = Counter(one.status for one in trajectories)
    return metrics | {f"status/{status.value}": counts[status] / n for status in Status}


def _mean_and_std(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and deviation of the values that are there; NaN and 0 when none is."""
    there = np.asarray(values, np.float64)
    there = there[~np.isnan(there)]
    if there.size == 0:
        return math.nan, 0.0
    return float(there.mean()), float(there.std(ddof=1)) if there.size > 1 else 0.0


class FirstCalls:
    """Finds out in a run's first batches that the model writes no tool call.

    Args:
        batches: how many to wait for; at most those of the run.
    """

    def __init__(self, batches: int):
        self._left = batches
        self._seen: list[Trajectory] = []

    def hint(self, trajectories: Sequence[Trajectory]) -> str | None:
        """What to print after a batch: once a hint, when no turn of the first batches held a `<tool_call>`."""
        if self._left <= 0:
            return None
        self._seen += trajectories
        turns = [m for one in self._seen for m in one.messages if m["role"] == "assistant"]
        # a call that was run, or one that does not parse, whose content is the raw text
        if any(m.get("tool_calls") or "<tool_call>" in (m.get("content") or "") for m in turns):
            self._left, self._seen = 0, []
            return None
        self._left -= 1
        if self._left:
            return None
        texts = [m.get("content") or "" for m in turns]
        bare = [text for text in texts if _BARE_CALL.search(text)]
        cut = sum(one.status is Status.OVERLONG for one in self._seen)
        if bare:
            cause = (
                f"{len(bare)} held a call as bare or fenced JSON, which is not run, the first {shorten(bare[0], 200)!r}; "
                "ask for <tool_call> tags in system_prompt"
            )
        elif 2 * cut > len(self._seen):
            cause = f"max_grpo_completion_length ended {cut} of {len(self._seen)} completions; raise it"
        else:
            cause = "rollouts/ shows what the model writes instead; ask for a call in system_prompt"
        return (
            f"Hint: none of the {len(texts)} turns of the first updates held a <tool_call>: {cause}, set cold_start "
            "to learn from gold calls first, or choose a model that was trained on this chat template with tools"
        )


# {"name": …, "arguments": …}, with the keys in either order and under either of their usual names
_BARE_CALL = re.compile(
    r'\{\s*"(?:name|function)"\s*:\s*"[^"]*"\s*,\s*"(?:arguments|parameters)"\s*:'
    r'|\{\s*"(?:arguments|parameters)"\s*:\s*\{.*"(?:name|function)"\s*:',
    re.S,
)
