"""TRL's side of `step.py --compare trl`; started by `compare_trl.py` in a separate process, without jax.

    python benchmarks/trl_step.py FOLDER

FOLDER holds `model/` (HF layout) and `job.json`; `result.json` is written next to them.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template

# the words of a message are its token ids, and a template that adds nothing renders them as they are
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ message.content }} "
    "{%- if message.tool_calls %} {{ message.tool_calls | tojson }} {%- endif %} {%- endfor %}"
)


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return f"Sum: {a + b}"


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose word "17" is token 17; the last id is the end of turn."""
    words = {str(i): i for i in range(vocabulary - 1)} | {"<end>": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=CHAT_TEMPLATE
    )
    fast.response_template = qwen3_template  # how TRL finds tool calls in what was sampled
    return fast


class Timed(GRPOTrainer):
    """GRPOTrainer that keeps the seconds of its parts, and the prompts that it rendered."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seconds = {"rollout": 0.0, "reward": 0.0}
        self.rendered: set[tuple[int, ...]] = set()

    def _generate(self, *args: Any, **kwargs: Any):
        began = time.perf_counter()
        result = super()._generate(*args, **kwargs)
        self.seconds["rollout"] += time.perf_counter() - began
        self.rendered |= set(map(tuple, result[0]))
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any):
        began = time.perf_counter()
        result = super()._calculate_rewards(*args, **kwargs)
        self.seconds["reward"] += time.perf_counter() - began
        return result


class StepTimes(TrainerCallback):
    """The seconds of every step, whole and by part; what is neither rollout nor reward is the update."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Take the step's time."""
        step = time.perf_counter() - self.began
        parts, self.trainer.seconds = self.trainer.seconds, {"rollout": 0.0, "reward": 0.0}
        self.steps.append({**parts, "update": step - sum(parts.values()), "step": step})


def grpo_config(job: dict[str, Any], folder: Path) -> GRPOConfig:
    """TRL's options: its defaults, except precision and what fixes the amount of work."""
    parts, rows = job["micro_batches"], len(job["prompts"]) * job["generations"]
    whole_groups = len(job["prompts"]) % parts == 0  # parts of whole prompts can be sampled separately
    return GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=rows // parts,
        gradient_accumulation_steps=parts,
        steps_per_generation=1 if whole_groups else parts,
        num_generations=job["generations"],
        max_completion_length=job["completion"],
        generation_kwargs={"min_new_tokens": job["completion"]},
        max_steps=job["steps"],
        gradient_checkpointing=job["checkpointing"],
        use_cpu=True,
        bf16=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Differs within a group, so that advantages are not zero."""
    return [float(i % 3) for i in range(len(completions))]


def run(folder: Path) -> dict[str, Any]:
    """Train as `job.json` says; returns times, metrics and the peak of this process in bytes.

    Raises:
        RuntimeError: TRL rendered other prompts, or sampled another number of tokens.
    """
    job = json.loads((folder / "job.json").read_text())
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # an error instead of exhausting the machine
    torch.set_num_threads(job["threads"])
    prompts = [" ".join(map(str, ids)) for ids in job["prompts"]]
    times = StepTimes()
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=reward,
        args=grpo_config(job, folder),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts]),
        processing_class=number_tokenizer(job["vocabulary"]),
        tools=[add],
        callbacks=[times],
    )
    times.trainer = trainer
    trainer.train()
    if trainer.rendered != set(map(tuple, job["prompts"])):
        raise RuntimeError("TRL rendered other token ids than those of the job")
    logs = [log for log in trainer.state.log_history if "completions/min_length" in log]
    lengths = {log[f"completions/{end}_length"] for log in logs for end in ("min", "max")}
    if lengths != {job["completion"]}:
        raise RuntimeError(f"TRL sampled {lengths} tokens a row instead of {job['completion']}")
    return {
        "steps": times.steps,
        "entropy": float(logs[0]["entropy"]),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": f"TRL {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "result.json").write_text(json.dumps(run(out)))
