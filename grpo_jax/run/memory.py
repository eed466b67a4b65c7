"""What an error of a full device says: what fills it, and which options to lower."""

from __future__ import annotations

import re
from collections import Counter

import jax

from grpo_jax.text import shorten

LARGEST = 6  # kinds of arrays that are named
# phase -> what makes it smaller, the cheapest first
ADVICE = {
    "rollout": "lower per_device_train_batch_size (completions at once) or max_grpo_completion_length, or raise "
    "mesh_fsdp",
    "update": "raise micro_batches, set gradient_checkpointing, optim_dtype bfloat16 or use_peft, lower "
    "max_grpo_completion_length, or raise mesh_fsdp",
    "evaluate": "lower eval_batch_size",
    "cold_start": "lower sft_batch_size, set gradient_checkpointing, optim_dtype bfloat16 or use_peft, or raise "
    "mesh_fsdp",
    "": "set param_dtype or optim_dtype bfloat16 or use_peft, raise mesh_fsdp, or take a smaller model",
}


# A program that was dispatched before its inputs were there says INTERNAL on a CPU, not RESOURCE_EXHAUSTED.
_WANTED = re.compile("(?:RESOURCE_EXHAUSTED: |(?=Out of memory))(.*)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of XLA is of a device without memory left."""
    return _WANTED.search(str(error)) is not None


def explain(error: BaseException) -> str:
    """The sentence for an error that `is_out_of_memory`.

    Args:
        error: with the note that `PhaseTimer` leaves on it.
    """
    notes = [
        note.removeprefix("phase: ") for note in getattr(error, "__notes__", ()) if note.startswith("phase: ")
    ]
    phase = next((name for name in notes if name in ADVICE), "")
    wanted = _WANTED.search(str(error))
    held: Counter[str] = Counter()
    for x in jax.live_arrays():
        held[f"{x.dtype}{list(x.shape)}"] += x.addressable_shards[0].data.nbytes
    largest = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in held.most_common(LARGEST))
    return (
        f"the device has no memory left in {phase or 'loading'}: {shorten(wanted[1] if wanted else str(error), 300)} "
        f"It holds {sum(held.values()) / 2**20:,.0f} MiB of arrays, on one device, by shape: {largest}. To fit: "
        f"{ADVICE[phase]}; python -m grpo_jax.train --plan TARGET with these options counts what a step needs"
    )
