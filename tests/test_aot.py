"""What a program compiled for a TPU is read to cost, worked by hand; and our programs as libtpu compiles them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import hlo

ROOT = Path(__file__).parents[1]

TEXT = """HloModule by_hand

%rows (from: bf16[64,128], at: s32[]) -> bf16[8,128] {
  %from = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%from, %at, %zero), dynamic_slice_sizes={8,128}
}

%three (x: (s32[], bf16[64,128])) -> pred[] {
  %x = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%x), index=0
  %bound = s32[]{:T(128)} constant(3)
  ROOT %below = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%layer (y: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %y = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%y), index=0
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%y), index=1
  %block = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %j), kind=kLoop, calls=%rows
  %product = f32[8,8]{1,0:T(8,128)} convolution(%block, %block), dim_labels=bf_oi->bf
  %sum = f32[8,8]{1,0:T(8,128)S(1)} all-reduce(%product), replica_groups={{0,1}}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%j, %w)
}

%unknown (z: (s32[], bf16[64,128])) -> pred[] {
  %z = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%z), index=0
  ROOT %more = pred[]{:T(512)} compare(%k, %k), direction=LT
}

%token (t: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %t = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %layers = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%t), condition=%three, body=%layer
  %cache = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%layers), index=1
  %l = s32[]{:T(128)} get-tuple-element(%layers), index=0
  %other = bf16[64,128]{0,1:T(8,128)(2,1)} copy(%cache)
  ROOT %again = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%l, %cache)
}

ENTRY %main (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %p = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%p), condition=%unknown, body=%token
}
"""


def test_a_programs_costs_by_hand():
    """Three layers in a token: a product of 2·8·8·128 FLOP; 8 of the 64 rows read (the scalar's tile is 512 bytes), the
    product written with its lanes padded to 128 and read to be summed; and a copy, transposed with 64 lanes padded."""
    program = hlo.Program(TEXT)
    assert program.flop() == 3 * 2 * 8 * 8 * 128
    assert program.collectives() == program.collectives(in_loop=True) == {"all-reduce": (3, 3 * 8 * 128 * 4)}
    layer = 8 * 128 * 2 + 4 + 2 * 8 * 128 * 4
    assert program.traffic(in_loop=True) == program.traffic() == 3 * layer + 64 * 128 * 2 + 128 * 128 * 2
    assert program.copies(64 * 128) == ["other bf16[64, 128]"] and program.copies(64 * 128 + 1) == []
    assert program.inner_loops() == ["loop layers"]


@pytest.mark.parametrize(
    ("window", "size", "out", "taps"),
    [
        ("size=3 pad=1_1", 4, 4, 10),  # the first and the last output see two inputs
        ("size=2 pad=1_1 rhs_reversal=1", 1, 2, 2),  # a batch of two as a window: an input each
        ("size=2 stride=2 lhs_dilate=2", 2, 1, 1),  # the second position is a hole
    ],
)
def test_a_windows_products_are_counted_where_there_is_input(window, size, out, taps):
    assert hlo._taps(f"window={{{window}}}", 0, size, out) == taps


NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install ".[tpu]"'
)
SIZES = dict(vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, rms_norm_eps=1e-6)
HEADS = dict(
    num_attention_heads=4, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True, rope_theta=1e4
)
# compiled with it, as a check that it is seen: a table whose rows lie in parts, looked up for rows that lie elsewhere
CONTROL = """
import aot, jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.reshape(aot.tpu_devices("v5e", 8), (4, 2)), ("x", "y"))
rows = NamedSharding(mesh, P("x", None, None))
table = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, ("x", "y"))))
ids = jax.ShapeDtypeStruct((16, 8), jnp.int32, sharding=NamedSharding(mesh, P("x")))
with aot.logged() as log:
    jax.jit(lambda t, i: 2 * jax.lax.with_sharding_constraint(t[i], rows)).lower(table, ids).compile()
    print(aot.rematerialized(log()))
"""


def run(*argv: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@NEEDS_LIBTPU
def test_programs_for_a_tpu_move_and_compute_what_they_must(tmp_path):
    """On two chips of a v5e, two layers: no loop over rows in decode's, nothing rematerialized that need not be.

    Caches this small (34 MB a layer) XLA fetches into on-chip memory whole and writes back, which a copy is; of those of
    Qwen3-1.7B it does not, and moves 1.03 times the formula's bytes (docs/log.md).
    """
    config = SIZES | HEADS | {"model_type": "qwen3", "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    options = {
        "--config": "configs/quickstart.yaml",
        "--model_name_or_path": str(tmp_path),
        "--max_grpo_completion_length": "500",
    }
    words = ["--target", "v5e-2", "--layers", "2", "--programs", "decode", "append"]
    ran = run("benchmarks/aot.py", *words, *(x for option in options.items() for x in option))
    rows = [re.split(r" *\| *", line)[1:-1] for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 3, ran.stderr[-2000:]
    decode, append = (dict(zip(rows[0], row, strict=True)) for row in rows[1:])
    assert (decode["program"], append["program"], append["problems"]) == ("decode", "append", "none")
    assert not re.search("loop|rematerialized", decode["problems"])
    assert 0.9 < float(decode["bytes"].split(", ")[1]) < 2
    for row in (decode, append):
        assert 0.95 < float(row["FLOP"].split(", ")[1]) < 1.1
    assert decode["collectives"].startswith("7 all-reduce")  # two a layer, the embedding's, two for drawing


@pytest.mark.slow
@NEEDS_LIBTPU
def test_an_involuntary_rematerialization_is_seen():
    ran = run("-c", CONTROL)
    assert "gather" in ran.stdout, ran.stderr[-2000:]
