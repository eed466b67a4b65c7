"""Questions that need two calls, the second with the result of the first, and a reward per step.

python examples/two_calls.py    # some minutes on 2 CPU cores; no GPU, no download
"""

from pathlib import Path

from grpo_jax import GRPOConfig, GRPOTrainer
from tools_funcs.two_step_tools import TOOL_FUNCTIONS

DATA = Path(__file__).resolve().parents[1] / "data"


def steps(completions, answer, tool_call, **kwargs):
    """1.0 for the right last result; else 0.25 for each call that has a gold call's name and arguments."""
    scores = []
    for messages, expected, gold in zip(completions, answer, tool_call, strict=True):
        results = [m["content"] for m in messages if m["role"] == "tool"]
        calls = [c["function"] for m in messages for c in m.get("tool_calls", [])]
        made = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        right = bool(results) and results[-1] == expected
        scores.append(1.0 if right else 0.25 * sum(one in made for one in gold))
    return scores


def main(**options) -> GRPOTrainer:
    """Cold start on gold conversations of two calls, then GRPO; options override those below."""
    settings = {"max_steps": 60, "per_device_train_batch_size": 128, "learning_rate": 5e-4}
    settings |= {
        "max_completion_length": 191,
        "max_tool_calling_iterations": 2,
        "output_dir": "runs/two_calls",
    }
    settings |= {"cold_start": True, "sft_learning_rate": 2.5e-3, "sft_stop_match": 0.4}
    trainer = GRPOTrainer(
        model="scratch",
        tools=TOOL_FUNCTIONS,
        reward_funcs=steps,
        train_dataset=str(DATA / "two_step_train.jsonl"),
        eval_dataset=str(DATA / "two_step_test.jsonl"),
        args=GRPOConfig(**settings | options),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    trainer = main()
    question = "71000 GBP grows 9.25% a year over 8 years, then I change it all into CHF. What do I get?"
    for message in trainer.generate(question):
        print(message)
