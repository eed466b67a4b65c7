"""An estimate of a step on one and several groups of devices, for docs/scale.md; arithmetic only, nothing is measured.

    python benchmarks/scale.py

A group shares the weights (fsdp in training); groups share the batch (data). FLOP and bytes are those of
grpo_jax/models/cost.py, every completion uses its whole budget, tools take no time. Seconds:

    update   FLOP / (devices · FLOP_SHARE · peak)
    decode   per token, the longer of FLOP and bytes read in a group, plus 2·L sums of activations of LATENCY each
    inside   3 · 2 bytes · M · (n − 1)/n / (LINK_SHARE · link inside): weights gathered in the forward and in the
             backward pass, gradients scattered, over the n devices of a group
    between  2 · (h − 1)/h · 2 bytes · M / n / (LINK_SHARE · link between): gradients summed over h groups

both for every micro-batch: whether XLA moves sums of gradients out of their loop was not looked at.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from grpo_jax.models import cost
from grpo_jax.models.cost import Lengths, Rates
from grpo_jax.preflight.plan import BYTES_SHARE, FLOP_SHARE
from grpo_jax.preflight.plan_inputs import DEVICES, PUBLISHED

# configs/qwen3_8b_lora.yaml on eight devices, as `--plan` pads it
LENGTHS = Lengths(P=32, G=8, T0=6272, T1=128, T2=1024)
LINK_SHARE, LATENCY = 0.6, 10e-6  # assumed; seconds for one small sum over a group


class Group(NamedTuple):
    """Devices that share the weights, and bytes/s of a device in one direction, inside and between groups."""

    kind: str
    devices: int
    inside: float
    between: float
    micro_batches: int


GROUPS = {
    # published: 1,600 Gbit/s a chip inside a slice, two 100 Gbit/s NICs for a host of eight chips
    "v5e, slices of 8": Group("v5e", 8, 200e9, 25e9 / 8, 8),
    # published: 1,200 GB/s a chip in both directions; the groups of v5p-64 lie in one slice
    "v5p, groups of 8 in a slice": Group("v5p", 8, 600e9, 600e9, 2),
    # published: 900 GB/s a GPU in both directions; assumed: a NIC of 400 Gbit/s for each GPU
    "H200, hosts of 8": Group("h200", 8, 450e9, 50e9, 2),
}


def seconds(group: Group, h: int) -> tuple[float, float, float, float]:
    """Rollout, update, and network inside and between h groups, for the whole batch."""
    cfg, (_, peak) = PUBLISHED["Qwen3-8B"], DEVICES[group.kind]
    n, M = group.devices, cost.weights(cfg)
    own = dataclasses.replace(LENGTHS, P=LENGTHS.P // h)
    rates = Rates(n * FLOP_SHARE * peak.flops, n * BYTES_SHARE * peak.bytes)
    rollout = cost.least_prefill(cfg, LENGTHS, rates) / h + cost.least_decode(cfg, own, rates, 2)[0]
    rollout += LENGTHS.T2 * 2 * cfg.L * LATENCY
    update = cost.least_update(cfg, LENGTHS, True, rates) / h
    m = max(group.micro_batches // h, 1)
    inside = m * 3 * 2 * M * (n - 1) / n / (LINK_SHARE * group.inside)
    between = m * 2 * (h - 1) / h * 2 * M / n / (LINK_SHARE * group.between)
    return rollout, update, inside, between


def main() -> None:
    """Print a table for each kind of group."""
    print("| groups | h | devices | rollout s | update s | inside s | between s | step s | rows/s a device |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, group in GROUPS.items():
        for h in (1, 2, 4, 8, 16, 32):
            parts = seconds(group, h)
            rate = LENGTHS.B / sum(parts) / (h * group.devices)
            figures = " | ".join(f"{x:.2f}" for x in (*parts, sum(parts), rate))
            print(f"| {name} | {h} | {h * group.devices} | {figures} |")


if __name__ == "__main__":
    main()
