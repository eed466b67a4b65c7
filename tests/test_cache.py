"""A model folder with another chat template, kept in the cache."""

import os
from pathlib import Path

import helpers
import parity
import pytest

from grpo_jax.models import cache, hf
from grpo_jax.models.scratch import CHAT_TEMPLATE
from grpo_jax.rollout.conversation import load_conversation
from grpo_jax.run.inputs import templated

MUTE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose own template knows no tools."""
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    shape = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 32}
    made = helpers.make_tiny_checkpoint(tmp_path / "model", ["Hello"], helpers.Sizes(vocab_size=300, **shape))
    (made / "chat_template.jinja").write_text(MUTE)
    return made


def test_the_template_is_replaced_and_exported_with_the_model(folder, tmp_path):
    with pytest.raises(ValueError, match=r"writes no <tool_call>; .* or --chat_template hermes"):
        load_conversation(folder)
    made = templated(folder, "hermes")
    assert load_conversation(made).tokenizer.chat_template == CHAT_TEMPLATE
    cfg, params = parity.load(made)
    hf.save_model(tmp_path / "exported", params, cfg, made)
    assert load_conversation(tmp_path / "exported").tokenizer.chat_template == CHAT_TEMPLATE
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_is_made_once_and_anew_when_its_source_changes(folder, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE + "{# mine #}")
    made = templated(folder, str(template))
    assert load_conversation(made).tokenizer.chat_template.endswith("{# mine #}")
    assert templated(folder, str(template)) == made and templated(folder, "hermes") != made
    os.utime(folder / "tokenizer_config.json", ns=(1, 1))
    assert templated(folder, str(template)) != made
    assert templated(folder, None) is folder
    assert [p for p in Path(cache.CACHE).iterdir() if "partial" in p.name] == []


def test_a_template_file_that_is_not_there_is_named(folder):
    with pytest.raises(
        ValueError,
        match=r"chat_template must be hermes or a text file, and none\.jinja cannot be read: No such",
    ):
        templated(folder, "none.jinja")


@pytest.mark.parametrize(
    ("kept", "cut", "what"),
    [
        ("{%- if tools %}", "{%- if false %}", "the tools"),
        (
            "{%- for tool_call in message.tool_calls or [] %}",
            "{%- for tool_call in [] %}",
            "an assistant's tool",
        ),
        ("{%- elif message.role == 'tool' %}", "{%- elif false %}", "tool results"),
    ],
)
def test_a_template_that_drops_something_is_named_with_what_it_drops(folder, kept, cut, what):
    assert CHAT_TEMPLATE.count(kept) == 1
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace(kept, cut))
    with pytest.raises(ValueError, match=f"drops {what}.*: rendered with 'probe"):
        load_conversation(folder)
