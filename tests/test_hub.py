"""Models and tokenizers by hub id: from the cache when there is no network, the revision that was asked for.

The cache is made by hand in the layout that huggingface_hub documents.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from parity import QWEN2, QWEN3, load, write_checkpoint

from grpo_jax.models.hf import fetch_model, fetch_tokenizer, read_config
from grpo_jax.rollout.conversation import load_conversation

NAME = "Some/Model"
REVISIONS = {"main": ("a" * 40, QWEN3), "v2": ("b" * 40, QWEN2)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with two revisions of one model, and no hub."""
    folder = tmp_path / "hub" / "models--Some--Model"
    for revision, (commit, config) in REVISIONS.items():
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        write_checkpoint(folder / "snapshots" / commit, config)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    return folder


@pytest.mark.parametrize(
    ("revision", "offline"),
    [("main", True), ("v2", True), ("b" * 40, True), (None, True), ("main", False), ("v2", False)],
)
def test_a_cached_model_is_used_in_the_asked_revision(cache, revision, offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    commit, config = REVISIONS["v2" if revision == "b" * 40 else revision or "main"]
    folder = fetch_model(NAME, revision)
    assert folder == cache / "snapshots" / commit
    cfg, params = load(folder)
    assert cfg == read_config(folder) and cfg.model_type == config["model_type"]
    assert params["embedding"].shape == (config["vocab_size"], config["hidden_size"])


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
@pytest.mark.parametrize(("name", "revision"), [(NAME, "v3"), ("Some/Other", "main")])
def test_what_is_not_cached_is_named_with_the_mend(cache, name, revision, offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(
        FileNotFoundError, match=f"model {name} is not a local folder, is not in the hub cache"
    ):
        fetch_model(name, revision)


def test_the_environment_variable_is_honoured(cache):
    """In a separate process, as a user sets it."""
    code = f"from grpo_jax.models.hf import fetch_model; print(fetch_model({NAME!r}, 'v2'))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache.parent)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert out.stdout == f"{cache / 'snapshots' / REVISIONS['v2'][0]}\n"


def test_a_cached_tokenizer_is_used_without_weights(cache, monkeypatch):
    import launch

    folder = cache / "snapshots" / REVISIONS["main"][0]
    (folder / "model.safetensors").unlink()
    for file in launch.small_model().glob("*.json"):
        shutil.copy(file, folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch_tokenizer(NAME) == folder
    assert load_conversation(fetch_tokenizer(NAME)).end_of_turn == "<|im_end|>"
