"""model/README.md: what a run says of its model, that its Python runs, and what servers read of config.json."""

import json
import re

import launch
import pytest
import yaml

from grpo_jax.models.qwen import SUPPORTED
from grpo_jax.run.log import write_json_atomic
from grpo_jax.run.model_card import write_model_card
from tools_funcs.math_tools import add, multiply


@pytest.fixture(scope="module")
def card():
    return (launch.smoke().folder / "model/README.md").read_text()


def test_the_card_says_where_the_model_comes_from_and_what_it_can_do(card):
    header, text = re.match(r"---\n(.*?)---\n(.*)", card, re.S).groups()
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tool-calling", "grpo"],
    }
    after = launch.smoke().json("summary.json")["after"]
    low, high = after["intervals"]["turn_closed"]
    shown = f"{after['turn_closed']:.3f} ({low:.3f} to {high:.3f}) |"
    assert re.search(rf"^\| `turn_closed` \| .* \| {re.escape(shown)}$", text, re.M)
    for said in ("trained by GRPO for 2 updates", "| base model | a new small model |", "`add`, `multiply`"):
        assert said in text
    assert '- `model_name_or_path`: `"scratch"`' in text


@pytest.mark.torch
def test_its_python_runs_and_prints_what_the_model_says_to_its_tools(card, capsys):
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    code = code.replace('"FOLDER", [...]', "folder, [add, multiply]").replace("256", "4")
    names = {"folder": launch.smoke().folder / "model", "add": add, "multiply": multiply}
    capsys.readouterr()
    exec(code, names)
    asked = names["inputs"]["input_ids"][0]
    said = names["output"][0, len(asked) :]
    assert 1 <= len(said) <= 4
    assert capsys.readouterr().out == names["tokenizer"].decode(said) + "\n"
    assert all(f'"name": "{name}"' in names["tokenizer"].decode(asked) for name in ("add", "multiply"))


def test_a_model_of_the_hub_and_another_step(tmp_path):
    """A step whose evaluation is not the last has the figures before training alone."""
    write_json_atomic(tmp_path / "run/summary.json", launch.smoke().json("summary.json") | {"updates": 9})
    launch.write(tmp_path / "run/resolved_config.yaml", "model_name_or_path: Qwen/Qwen3-0.6B\n")
    folder = tmp_path / "run/model"
    launch.write(folder / "chat_template.jinja", "<tool_call><function=")
    write_model_card(folder, tmp_path / "run", 5)
    text = (folder / "README.md").read_text()
    assert "base_model: Qwen/Qwen3-0.6B" in text and "| figure | before |" in text
    assert "--tool-call-parser qwen3_coder" in text
    write_model_card(folder, tmp_path / "nothing", 0)  # a trainer that has not trained
    assert "It has not been evaluated." in (folder / "README.md").read_text()


def test_what_vllm_reads_of_the_config_is_there():
    """vllm/model_executor/models/registry.py and qwen2.py, qwen3.py: architectures, and these sizes."""
    config = json.loads((launch.smoke().folder / "model/config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] == [SUPPORTED[config["model_type"]]]
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    more = ("num_hidden_layers", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    assert all(config[name] > 0 for name in (*sizes, *more))
    assert config["hidden_act"] == "silu" and config["tie_word_embeddings"] in (True, False)
