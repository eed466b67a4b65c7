"""Adapters against PEFT's own on torch's Qwen2 and Qwen3: the folder that we write, its logits and gradients."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import CASES, GRADIENT_RTOL, LOGITS_ATOL, load, logits, tokens, write_checkpoint

from grpo_jax.models.lora import Frozen, LoraConfig, join
from grpo_jax.models.peft_folder import _tensors, save_adapter

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("peft")


def adapted(folder, adapter, trainable=False):
    """PEFT's model, with every tensor of the adapter's folder used and none made up."""
    import torch_reference
    from peft import PeftModel

    model = PeftModel.from_pretrained(torch_reference.published(folder), adapter, is_trainable=trainable)
    result = model.load_adapter(adapter, "again")
    assert not result.missing_keys or all("lora" not in name for name in result.missing_keys)
    assert not result.unexpected_keys
    model.delete_adapter("again")
    return model.eval()


@pytest.mark.parametrize("modules", [None, ["all-linear"], ["o_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_pefts_logits_and_gradients_of_our_folder_are_ours(case, modules, tmp_path):
    """The base's weights get no gradient, theirs nor ours."""
    import torch_reference

    folder = write_checkpoint(tmp_path / "base", CASES[case])
    cfg, base = load(folder)
    config = LoraConfig.of(rank=3, alpha=4.5, dropout=0.0, modules=modules)
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
    model = adapted(folder, tmp_path / "adapter", trainable=True)
    want = torch_reference.logits(model, ids)
    assert np.abs(want - np.asarray(logits(base, ids, cfg)[0])).max() > 0.5
    np.testing.assert_allclose(got[0], want, rtol=0, atol=LOGITS_ATOL)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name.replace(".default", ""): g for name, g in torch_reference.gradients(model, ids).items()}
    ours = _tensors(grads, config)
    assert theirs.keys() == ours.keys()
    assert len(trainable) == len(ours)
    for name, g in theirs.items():
        assert np.linalg.norm(ours[name] - g) <= GRADIENT_RTOL * np.linalg.norm(g), name
