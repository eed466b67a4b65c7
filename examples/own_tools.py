"""Your own tools, reward and data from Python: a new small model learns to call two functions.

python examples/own_tools.py    # some minutes on 2 CPU cores; no GPU, no download
"""

import random

from grpo_jax import GRPOConfig, GRPOTrainer


def add(a: int, b: int) -> str:
    """Add two numbers."""
    return f"Sum: {a + b}"


def multiply(a: int, b: int) -> str:
    """Multiply two numbers."""
    return f"Product: {a * b}"


def exact(completions, answer, **kwargs):
    """1.0 for the right tool result, 0.3 for any call, 0.0 for none."""
    results = [[m["content"] for m in messages if m["role"] == "tool"] for messages in completions]
    return [0.0 if not r else 1.0 if r[-1] == a else 0.3 for r, a in zip(results, answer, strict=True)]


def row(rng: random.Random) -> dict:
    """A prompt, the expected tool result, and the call that gives it, for the cold start."""
    tool, word = rng.choice([(add, "plus"), (multiply, "times")])
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    call = {"name": tool.__name__, "arguments": {"a": a, "b": b}}
    return {"prompt": f"What is {a} {word} {b}?", "answer": tool(a, b), "tool_call": call}


def main(**options) -> GRPOTrainer:
    """Cold start on gold calls, then GRPO; options override those below."""
    rng = random.Random(0)
    settings = {"max_steps": 60, "per_device_train_batch_size": 128, "learning_rate": 5e-4}
    settings |= {"max_completion_length": 63, "adam_beta2": 0.95, "output_dir": "runs/own_tools"}
    settings |= {"cold_start": True, "sft_learning_rate": 2.5e-3, "sft_stop_match": 0.4}
    trainer = GRPOTrainer(
        model="scratch",  # or a hub id, or a folder
        tools=[add, multiply],
        reward_funcs=exact,
        train_dataset=[row(rng) for _ in range(4000)],
        eval_dataset=[row(rng) for _ in range(200)],
        args=GRPOConfig(**settings | options),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    for message in main().generate("What is 15 plus 27?"):
        print(message)
