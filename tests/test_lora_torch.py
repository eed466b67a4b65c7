"""Adapters against PEFT's own on torch's Qwen2 and Qwen3: the folder that we write, its logits and gradients."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import CASES, GRADIENT_RTOL, LOGITS_ATOL, load, logits, tokens, write_checkpoint

from grpo_jax.models.hf import save_model
from grpo_jax.models.lora import Frozen, LoraConfig, join, merge
from grpo_jax.models.peft import peft_tensors, save_adapter
from grpo_jax.run.job import lora_config
from grpo_jax.run.options import GRPOConfig

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("peft")

CHOSEN = {
    "qwen2": None,
    "qwen2-tied": ["o_proj", "down_proj"],
    "qwen3": ["all-linear"],
    "qwen3-tied": ["k_proj", "gate_proj"],
}


@pytest.mark.parametrize("case", CHOSEN)
def test_pefts_logits_and_gradients_of_our_folder_are_ours(case, tmp_path):
    """Random A and B; a tensor that PEFT did not find in the folder would show in the logits."""
    import peft
    import torch_reference

    folder = write_checkpoint(tmp_path / "base", CASES[case])
    cfg, base = load(folder)
    config = LoraConfig.of(rank=3, alpha=4.5, dropout=0.0, modules=CHOSEN[case])
    adapters, frozen = helpers.random_adapters(base["layers"], config), Frozen(base, jnp.uint32(0), config)
    save_adapter(tmp_path / "adapter", adapters, config, str(folder))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(adapters):
        out = logits(join(adapters, frozen), ids, cfg)
        logprobs = jax.nn.log_softmax(out[:, :-1])
        return -jnp.take_along_axis(logprobs, jnp.asarray(ids)[:, 1:, None], 2).mean(), out

    ids = tokens()
    (_, got), grads = loss(adapters)
    model = torch_reference.published(folder)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).eval()
    want = torch_reference.logits(model, ids)
    assert np.abs(want - np.asarray(logits(base, ids, cfg)[0])).max() > 0.5
    np.testing.assert_allclose(got[0], want, rtol=0, atol=LOGITS_ATOL)
    save_model(tmp_path / "merged", merge(join(adapters, frozen)), cfg, folder)
    merged = torch_reference.logits(torch_reference.published(tmp_path / "merged"), ids)
    np.testing.assert_allclose(merged, want, rtol=0, atol=LOGITS_ATOL)
    theirs = {name.replace(".default", ""): g for name, g in torch_reference.gradients(model, ids).items()}
    ours = peft_tensors(grads, config)
    assert theirs.keys() == ours.keys()
    for name, g in theirs.items():
        assert np.linalg.norm(ours[name] - g) <= GRADIENT_RTOL * np.linalg.norm(g), name


@pytest.mark.parametrize("rank", [4, 6])
def test_rslora_scales_as_pefts_does(rank):
    import peft
    import torch

    theirs = peft.LoraConfig(r=rank, lora_alpha=32, use_rslora=True, target_modules=["0"])
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), theirs).base_model.model[0]
    ours = lora_config(GRPOConfig(use_peft=True, lora_r=rank, lora_alpha=32, use_rslora=True))
    assert ours.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
