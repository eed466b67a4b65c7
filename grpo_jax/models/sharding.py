"""Every sharding choice: the mesh, one table of weights, one table of activations.

The mesh is ("data", "fsdp", "tensor"). Training shards weights over fsdp and
tensor and gathers them over fsdp layer by layer; rows run over data and fsdp.
The rollout keeps its weights where they are (over fsdp and tensor together) and
runs rows over data only: with the training column one decode step would gather
every weight. A dimension that its axes do not divide is replicated (Qwen2.5-0.5B
has 14 query and 2 key/value heads).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax import hosts
from grpo_jax.models.target import Devices

AXES = ("data", "fsdp", "tensor")
AUTO = (AxisType.Auto,) * 3
ROWS = ("data", "fsdp")  # what completions are sharded over in training
STAY = ("fsdp", "tensor")  # what weights are sharded over in the rollout

# leaf name: (training, rollout), both without the layer dimension
WEIGHTS = {
    "embedding": ((STAY, None), (STAY, None)),  # [V, D]: D whole, so that logits need no reduction
    "head": ((STAY, None), (STAY, None)),  # [V, D]
    "q": (("fsdp", "tensor", None), (None, STAY, None)),  # [D, N, H]
    "k": (("fsdp", "tensor", None), (None, STAY, None)),  # [D, K, H]
    "v": (("fsdp", "tensor", None), (None, STAY, None)),  # [D, K, H]
    "o": (("tensor", None, "fsdp"), (STAY, None, None)),  # [N, H, D]
    "q_bias": (("tensor", None), (STAY, None)),  # [N, H]
    "k_bias": (("tensor", None), (STAY, None)),  # [K, H]
    "v_bias": (("tensor", None), (STAY, None)),  # [K, H]
    "gate": (("fsdp", "tensor"), (None, STAY)),  # [D, F]
    "up": (("fsdp", "tensor"), (None, STAY)),  # [D, F]
    "down": (("tensor", "fsdp"), (STAY, None)),  # [F, D]
    "scale": ((None,), (None,)),
}
# Adapters lie as their weight does: A [inputs, R], B [R, outputs], the rank whole.
_INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # dimensions
WEIGHTS |= {f"{w}_lora_a": tuple((*spec[:n], None) for spec in WEIGHTS[w]) for w, n in _INPUTS.items()}
WEIGHTS |= {f"{w}_lora_b": tuple((None, *spec[n:]) for spec in WEIGHTS[w]) for w, n in _INPUTS.items()}
_FACTORS = {"v_row", "v_col", "v"}  # of adafactor, which has no whole second moment: small, and replicated

# kind of activation: (training, rollout). "shared" levels (preamble, prompts) have too few
# rows to shard, so their tokens are sharded; their keys and values are needed by every row.
ACTIVATIONS = {
    "rows_x": ((ROWS, None, None), ("data", None, None)),  # [B, T, D]
    "rows_heads": ((ROWS, None, "tensor", None), ("data", None, STAY, None)),  # [B, T, N, H]
    "rows_kv": ((ROWS, "tensor", None, None), ("data", STAY, None, None)),  # [B, K, T, H]
    "rows_mlp": ((ROWS, None, "tensor"), ("data", None, STAY)),  # [B, T, F]
    "shared_x": ((None, ROWS, None), (None, "data", None)),  # [n, T, D]
    "shared_heads": ((None, ROWS, "tensor", None), (None, "data", STAY, None)),
    "shared_kv": ((None, "tensor", None, None), (None, STAY, None, None)),
    "shared_mlp": ((None, ROWS, "tensor"), (None, "data", STAY)),
    "embedding": ((STAY, None), (STAY, None)),  # [V, D]
    "head": ((STAY, None), (STAY, None)),  # [V, D]
    "head_hidden": (("data", None, None), ("data", None, None)),  # [B, J, D], gathered over fsdp
    "head_blocks": ((None, STAY, None), (None, STAY, None)),  # [blocks, V/…, D], a part of every shard
    "logits_block": ((STAY, None, "data"), (STAY, None, "data")),  # [shards, V/…, B·J]
    "decode_logits": (("data", STAY), ("data", STAY)),  # [B, V]
    "decode_blocks": (("data", None), ("data", None)),  # [B, blocks], [B, tokens of a block]
}


def input_dimensions(name: str) -> int | None:
    """How many of a kernel's dimensions, without that of layers, are inputs; None for other weights."""
    weight, adapter, part = name.partition("_lora_")
    return 1 if adapter and part == "b" else _INPUTS.get(weight)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The mesh over all devices; -1 for data takes what fsdp and tensor leave.

    With several hosts, each holds a contiguous range along data and fsdp: the rows whose tools it runs.

    Raises:
        ValueError: when the sizes do not multiply to the number of devices, tensor does not divide the
            devices of a host, or several hosts did not join.
    """
    n = jax.device_count()
    sizes = mesh_sizes(data, fsdp, tensor, n, f"the number of devices, {n}")
    if hosts.alone():
        if jax.process_count() > 1:
            raise ValueError(
                f"the {n} devices belong to {jax.process_count()} processes that were not joined; set "
                f"{hosts.JOIN}=1 in all of them"
            )
        return jax.make_mesh(sizes, AXES, axis_types=AUTO)
    if jax.local_device_count() % tensor:
        raise ValueError(
            f"mesh_tensor must divide the number of devices of a host, {jax.local_device_count()}, got {tensor}: "
            "its devices communicate in every layer, which is too slow between hosts; lower it and raise mesh_fsdp"
        )
    # in the order of the processes; jax.make_mesh may interleave them on a TPU's torus
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return mesh_of(devices, sizes)


def mesh_of(devices: Devices, sizes: tuple[int, int, int]) -> Mesh:
    """A mesh of these devices, in their order."""
    return Mesh(np.reshape(devices, sizes), AXES, axis_types=AUTO)


def mesh_sizes(data: int, fsdp: int, tensor: int, n: int, devices: str) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor; -1 for data takes what the others leave.

    Args:
        devices: what they are called in an error.

    Raises:
        ValueError: when the sizes do not multiply to n.
    """
    if data == -1:
        data = max(n // (fsdp * tensor), 1)
    if data * fsdp * tensor != n:
        fix = "set mesh_data to -1 to fill up"
        if n % (fsdp * tensor):
            fix = f"lower mesh_fsdp or mesh_tensor, whose product must divide {n}"
        raise ValueError(
            f"mesh_data · mesh_fsdp · mesh_tensor must equal {devices}, got {data} · {fsdp} · {tensor}; {fix}"
        )
    return data, fsdp, tensor


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes and dtypes of a tree with a tree of shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One column of the tables on a mesh."""

    mesh: Mesh | AbstractMesh
    rollout: bool = False

    def params(self, tree: Any) -> Any:
        """NamedShardings for a tree of weights (or of anything with the same leaf names, as moments)."""
        return jax.tree_util.tree_map_with_path(lambda path, x: self._weight(path, x), tree)

    def rows(self, x: Any) -> NamedSharding:
        """Sharding of an array whose first dimension is completion rows."""
        return self._named(("data" if self.rollout else ROWS,), x.shape)

    def put(self, x: Any, sharding: NamedSharding) -> jax.Array:
        """A host array on the devices; the same in every process."""
        if hosts.alone():
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def put_rows(self, x: Any) -> jax.Array:
        """This process's rows [b, …] as its part of all rows [B, …]; b is the same in every process."""
        if hosts.alone():
            return jax.device_put(x, self.rows(x))
        x = np.asarray(x)
        shape = (len(x) * jax.process_count(), *x.shape[1:])
        whole = jax.make_array_from_process_local_data(self._named((ROWS,), shape), x, shape)
        return jax.device_put(whole, self.rows(whole))  # a rollout's rows lie along data alone

    def get_rows(self, tree: Any) -> Any:
        """The inverse of `put_rows` for a tree of arrays; scalars as they are."""
        if hosts.alone():
            return jax.device_get(tree)

        def own(x: Any) -> np.ndarray:
            if not x.ndim:
                return jax.device_get(x)
            x = jax.device_put(x, self._named((ROWS,), x.shape))
            # a dict, since there are copies along tensor
            parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
            return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

        return jax.tree.map(own, tree)

    def activation(self, shape: tuple[int, ...], kind: str) -> NamedSharding:
        """Sharding of an activation of a kind."""
        return self._named(ACTIVATIONS[kind][self.rollout], shape)

    def head_shards(self, V: int) -> int:
        """Parts that the V rows of the head are sharded into."""
        return self._size(STAY) if V % self._size(STAY) == 0 else 1

    @property
    def row_devices(self) -> int:
        """Devices along data and fsdp, over which training's completions are spread."""
        return self._size(ROWS)

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds all of it."""
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: Any, kind: str) -> Any:
        """Sharding constraint inside jit, by kind; `layer_weights` takes a whole layer.

        A layer's weights are constrained to their spec without fsdp: that gathers them for
        the layer's use, which makes the training column FSDP.
        """
        if self.mesh.size == 1:
            return x
        if kind == "layer_weights":
            drop = () if self.rollout else ("fsdp",)
            specs = jax.tree_util.tree_map_with_path(lambda path, w: self._weight(path, w, drop), x)
            return jax.lax.with_sharding_constraint(x, specs)
        return jax.lax.with_sharding_constraint(x, self.activation(x.shape, kind))

    def _weight(self, path, x, drop=()) -> NamedSharding:
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        leaf = names[-1] if names and names[-1] in WEIGHTS else None
        factor = any(getattr(k, "name", None) in _FACTORS for k in path)
        if leaf is None or factor:  # counters and other scalars of an optimizer
            return self.replicated
        spec = WEIGHTS[leaf][self.rollout]
        spec = tuple(None if axis in drop else axis for axis in spec)
        return self._named((None,) * (len(x.shape) - len(spec)) + spec, x.shape)

    def _named(self, spec, shape) -> NamedSharding:
        fitted = [
            axis if axis is not None and size % self._size(axis) == 0 else None
            for axis, size in zip(spec, shape, strict=False)
        ]
        return NamedSharding(self.mesh, PartitionSpec(*fitted))

    def _size(self, axis: str | tuple[str, ...]) -> int:
        axes = (axis,) if isinstance(axis, str) else axis
        return functools.reduce(lambda n, a: n * self.mesh.shape[a], axes, 1)
