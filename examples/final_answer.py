"""Two rewards with weights: the tool's result, and a final answer that states it.

python examples/final_answer.py    # some minutes on 2 CPU cores; no GPU, no download
"""

import re
from pathlib import Path

from grpo_jax import GRPOConfig, GRPOTrainer
from tools_funcs.math_tools import add, multiply

DATA = Path(__file__).resolve().parents[1] / "data"


def states_the_result(completions, **kwargs):
    """1.0 if the last message states every number of the last tool result; None without a result."""
    scores = []
    for messages in completions:
        results = [m["content"] for m in messages if m["role"] == "tool"]
        last = messages[-1]
        if not results:
            scores.append(None)
        else:
            said = last["content"] if last["role"] == "assistant" else ""
            wanted = re.findall(r"\d+", results[-1])
            scores.append(float(bool(wanted) and all(n in re.findall(r"\d+", said) for n in wanted)))
    return scores


def main(**options) -> GRPOTrainer:
    """Cold start on gold calls, then GRPO on both rewards; options override those below."""
    settings = {"max_steps": 60, "per_device_train_batch_size": 64, "learning_rate": 5e-4}
    settings |= {"max_completion_length": 63, "output_dir": "runs/final_answer", "reward_weights": [1.0, 1.0]}
    settings |= {"cold_start": True, "sft_learning_rate": 2.5e-3, "sft_stop_match": 0.5}
    trainer = GRPOTrainer(
        model="scratch",
        tools=[add, multiply],
        reward_funcs=["accuracy", states_the_result],
        train_dataset=str(DATA / "math_train.jsonl"),
        eval_dataset=f"{DATA / 'math_test.jsonl'}[:200]",
        args=GRPOConfig(**settings | options),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    for message in main().generate("What is 15 plus 27?"):
        print(message)
