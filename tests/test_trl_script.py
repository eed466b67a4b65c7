"""A script written for TRL's GRPOTrainer runs with ours when its import is changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import launch
import pytest

TOKENIZER = Path(__file__).parents[2] / "shared" / "qwen_tokenizer" / "qwen3"
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not TOKENIZER.exists(), reason="needs the published Qwen3 tokenizer"),
]

SCRIPT = '''
from datasets import Dataset
from {package} import GRPOConfig, GRPOTrainer


def multiply(a: int, b: int) -> str:
    """Multiply two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    return str(a * b)


def length(completions, answer, **kwargs):
    assert len(answer) == len(completions)
    return [len(str(messages)) % 7 / 7 for messages in completions]


def main():
    questions = [f"What is {{a}} times {{a + 2}}?" for a in range(3, 11)]
    dataset = Dataset.from_list(
        [{{"prompt": [{{"role": "user", "content": q}}], "answer": str(i)}} for i, q in enumerate(questions)]
    )
    trainer = GRPOTrainer(
        model="{model}",
        reward_funcs=length,
        args=GRPOConfig(
            output_dir="{out}",
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=16,
            learning_rate=1e-3,
            beta=0.04,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=dataset,
        tools=[multiply],
    )
    trainer.train()
    trainer.save_model("{out}/final")


if __name__ == "__main__":
    main()
'''

MODEL = """
import sys, torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = Qwen3Config(
    vocab_size=151936, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
Qwen3ForCausalLM(config).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""


def python(*words, folder):
    environment = {**os.environ, **launch.ENVIRONMENT, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random two-layer Qwen3 with the published tokenizer and template, as transformers writes it."""
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("trl_script")
    python("-c", MODEL, TOKENIZER, folder / "model", folder=folder)
    return folder / "model"


@pytest.mark.parametrize("package", ["trl", "grpo_jax"])
def test_the_same_script_trains_and_saves_a_model_under_both_imports(tmp_path, model, package):
    script = SCRIPT.format(package=package, model=model, out=tmp_path / "out")
    python(launch.write(tmp_path / "script.py", script), folder=tmp_path)
    final = tmp_path / "out" / "final"
    assert (final / "model.safetensors").exists() and (final / "tokenizer.json").exists()
    assert json.loads((final / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
