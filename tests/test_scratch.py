"""The small checkpoint has a published one's layout, and a tokenizer and template that behave."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from grpo_jax.models.scratch import SPECIAL_TOKENS, TAG_TOKENS, Sizes, make_tiny_checkpoint

TEXTS = [f"What is {i} plus {j}? The answer is {i + j}. It's done." for i in range(20) for j in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", TEXTS)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def _weights(folder):
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_files_of_a_published_checkpoint(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_weights_have_published_names_and_shapes(folder):
    weights = _weights(folder)
    last = {name: w.shape for name, w in weights.items() if ".layers.3." in name}
    assert last == {
        "model.layers.3.input_layernorm.weight": (128,),
        "model.layers.3.self_attn.q_proj.weight": (128, 128),
        "model.layers.3.self_attn.k_proj.weight": (64, 128),
        "model.layers.3.self_attn.v_proj.weight": (64, 128),
        "model.layers.3.self_attn.o_proj.weight": (128, 128),
        "model.layers.3.self_attn.q_norm.weight": (32,),
        "model.layers.3.self_attn.k_norm.weight": (32,),
        "model.layers.3.post_attention_layernorm.weight": (128,),
        "model.layers.3.mlp.gate_proj.weight": (384, 128),
        "model.layers.3.mlp.up_proj.weight": (384, 128),
        "model.layers.3.mlp.down_proj.weight": (128, 384),
    }
    assert weights["model.embed_tokens.weight"].shape == (700, 128)
    assert "lm_head.weight" not in weights
    assert len(weights) == 4 * 11 + 2
    assert sum(w.size for w in weights.values()) == 877_440
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}
    assert np.all(weights["model.layers.0.self_attn.q_norm.weight"] == 1.0)
    assert np.std(weights["model.layers.0.mlp.up_proj.weight"]) == pytest.approx(128**-0.5, rel=0.02)


def test_config_is_read_as_qwen3(folder):
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.head_dim, config.num_key_value_heads) == ("qwen3", 32, 2)
    assert config.tie_word_embeddings and not config.attention_bias
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == 1000.0 and written["architectures"] == ["Qwen3ForCausalLM"]


def test_control_tokens_follow_the_bpe_and_end_ids_agree(folder, tokenizer):
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *TAG_TOKENS])
    assert ids == list(range(len(tokenizer) - 9, len(tokenizer))) and len(tokenizer) <= 700
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tokenizer.eos_token_id == ids[2] and tokenizer.pad_token_id == ids[0]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == ids[2]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [ids[2], ids[0]]


@pytest.mark.parametrize("text", ["", "It's 1234.5\n\n\tand  é 漢字 🙂\r\n", "".join(map(chr, range(0x250)))])
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("120 plus") == ["1", "2", "0", "Ġplus"]


def test_same_arguments_same_bytes_other_seed_other_weights(tmp_path, folder):
    again = make_tiny_checkpoint(tmp_path / "again", iter(TEXTS))
    other = make_tiny_checkpoint(tmp_path / "other", TEXTS, seed=1)
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
        assert (path.read_bytes() == (other / path.name).read_bytes()) == (path.suffix != ".safetensors")


def test_template_writes_what_qwen3_does(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2?"},
        {
            "role": "assistant",
            "content": "Hm.",
            "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}] * 2,
        },
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "reasoning_content": "Which?", "content": "3"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tools=[{"x": "y"}], tokenize=False, add_generation_prompt=True
    )
    call = '<tool_call>\n{"name": "f", "arguments": {"é": 1}}\n</tool_call>'
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions")
    assert '<tools>\n{"x": "y"}\n</tools>' in system
    assert rest == (
        "<|im_start|>user\n1+2?<|im_end|>\n"
        f"<|im_start|>assistant\nHm.\n{call}\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nWhich?\n</think>\n\n3<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_existing_folder_is_left_alone(folder):
    with pytest.raises(ValueError, match="exists already"):
        make_tiny_checkpoint(folder, TEXTS)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_tiny_checkpoint(tmp_path / "model", TEXTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 264}, "vocab_size must be >= 265"),
        ({"kv_heads": 3}, "kv_heads must divide heads, got 3 and 4"),
    ],
)
def test_impossible_sizes_are_named(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_checkpoint(tmp_path / "model", TEXTS, Sizes(**sizes))
