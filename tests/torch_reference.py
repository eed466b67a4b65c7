"""The published models' own results: transformers on torch, CPU, eager attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from parity import GREEDY, tokens, trajectories
from transformers import AutoModelForCausalLM


def published(folder: Path, dtype=torch.float32, attention: str = "eager"):
    """The folder's model, with every one of its tensors used and none made up."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model, tokens: np.ndarray) -> np.ndarray:
    """[T, V] of one row."""
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits[0].float().numpy()


def reference(folder: Path) -> dict[str, np.ndarray]:
    """What `parity.ours` is compared with."""
    model, ids = published(folder), tokens()
    greedy = ids[:, :16]
    while greedy.shape[1] < 16 + GREEDY:  # no cache, no generation code: the plainest form
        greedy = np.append(greedy, logits(model, greedy)[-1:].argmax(-1)[None], axis=1)
    return run(model) | {"greedy": greedy[0, 16:].astype(np.int32)}


def run(model) -> dict[str, np.ndarray]:
    """What `parity.run` is compared with."""
    results = {f"gradient/{name}": g for name, g in gradients(model, tokens()).items()}
    return results | {"logits": logits(model, tokens()), "tree": flat_logprobs(model)}


def gradients(model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean negative log-likelihood of each next token."""
    ids = torch.tensor(ids, dtype=torch.long)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).backward()
    return {name: p.grad.float().numpy().copy() for name, p in model.named_parameters() if p.requires_grad}


def flat_logprobs(model) -> np.ndarray:
    """Log-probabilities of all sampled tokens; every row is run alone, whole and unpadded."""
    out = []
    for row in trajectories():
        ids = np.array([row.prompt.ids + row.completion_ids])
        table = torch.log_softmax(torch.tensor(logits(model, ids)), -1).numpy()
        sampled = len(row.prompt.ids) + np.flatnonzero(row.sampled_mask)
        out.append(table[sampled - 1, ids[0, sampled]])
    return np.concatenate(out)
