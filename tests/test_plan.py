"""What `--plan` says: by hand for a tiny model, and its estimate against XLA's own memory analysis."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from grpo_jax.models import cost
from grpo_jax.models.qwen import ModelConfig
from grpo_jax.models.sharding import make_mesh
from grpo_jax.preflight import memory
from grpo_jax.preflight.memory import Temporary, estimate, plan_step, step_bytes
from grpo_jax.preflight.plan import find_remedies, fits, step_hours
from grpo_jax.preflight.plan_inputs import (
    GPU_SHARE,
    PUBLISHED,
    SCRATCH_SIZES,
    DataLengths,
    gpu_share,
    model_sizes,
    read_machine,
)
from grpo_jax.run.options import GRPOConfig

ROOT = Path(__file__).parents[1]
# 42 weights of matrices and 8 of norms a layer, 10 of the table, 2 of the last norm: 112
TINY = ModelConfig("qwen3", V=5, D=2, F=3, L=2, N=2, K=1, H=2, rope_theta=1e4, norm_eps=1e-6, tied=True)
DATA = DataLengths(rows=10, preamble=10, rest=4, exact=True)
OPTIONS = {"per_device_train_batch_size": 4, "num_generations": 2, "max_grpo_completion_length": 15}


def step_of(machine="1GB x 1", model=TINY, data=DATA, **options):
    return plan_step(GRPOConfig(**(OPTIONS | options)), model, data, read_machine(machine))


def bytes_of(step):
    return step_bytes(step, estimate(step))


def changed(step, changes):
    return plan_step(dataclasses.replace(step.config, **changes), step.model, step.data, step.machine)


@pytest.mark.parametrize(
    ("text", "count", "memory"),
    [
        ("v5e-8", 8, 17179869184),
        ("v6e-8", 8, 34359738368),
        ("v5p-64", 32, 102005473280),
        ("v4-8", 4, 34359738368),
        ("v5p", 1, 102005473280),
        ("h200", 1, 141e9),
        ("H100-8", 8, 80e9),
        ("80GB x 8", 8, 80e9),
        ("1.5GiB*2", 2, 1610612736),
        ("1000000 x 1", 1, 1e6),
        ("16e9x4", 4, 16e9),
    ],
)
def test_a_machine_is_read(text, count, memory):
    machine = read_machine(text)
    assert (machine.count, machine.memory) == (count, memory)


@pytest.mark.parametrize(
    "text", ["v9-8", "80GB", "80KB x 8", "8", "v5e-0", "v5p-3", "80GB x 0", "cpu-0", "1.2.3 x 4"]
)
def test_another_text_names_the_machines_there_are(text):
    with pytest.raises(ValueError, match="plan must be one of v4, v5e, v5p, v6e, h100, h200 or cpu"):
        read_machine(text)


def test_the_cpu_has_this_machines_memory():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert read_machine("cpu").memory == memory
    assert read_machine("cpu-4").memory == memory / 4


def test_bytes_by_hand():
    """112 weights; 2 · 2 · 2 · 2 = 16 bytes a slot; 16, 2 · 16 and 4 · 16 slots; 64 completion tokens."""
    step = step_of()
    assert step.lengths == cost.Lengths(P=2, G=2, T0=16, T1=16, T2=16)
    assert (step.sizes, step.micro_batches) == ((1, 1, 1), 1)
    x = step_bytes(step, Temporary(update=1000, decode=240))
    assert (x.weights, x.reference, x.gradients, x.rollout_copy) == (448, 0, 448, 224)
    assert x.moments == 896 + 3 * 4  # adam's counters, of two layers and of the rest
    assert (x.preamble_cache, x.prompts_cache, x.own_cache) == (256, 512, 1024)
    assert (x.activations, x.decode, x.evaluation) == (1000 - 448, 240, 0)
    assert x.update == 448 + 908 + 1000
    assert x.rollout == 448 + 908 + 224 + 256 + 512 + 1024 + 240


def test_an_estimate_by_hand():
    # 112 tokens of 2 layers · (2 + 4) bf16 values and 2 in fp32
    kept = 112 * 2 * (6 * 2 + 2 * 4)
    # 26 values of 48 shared tokens, 84 of the completions' 64, three arrays of 2 heads' scores
    layer = 4 * (26 * 48 + 84 * 64 + 3 * 2 * 64 * 16)
    # decode: three arrays of 4 rows' 5 logits
    assert estimate(step_of()) == (448 + kept + layer, 3 * 4 * 5 * 4)
    # 64 positions' 5,000 logits outweigh a layer: two arrays of the one block, the head and its gradient in bf16
    wide = step_of(model=dataclasses.replace(TINY, V=5000))
    gradients, head = 4 * (112 - 10 + 2 * 5000), 2 * 64 * 5000 * 4 + 2 * 2 * 5000 * 2
    assert estimate(wide).update == gradients + kept + head


def test_an_evaluation_has_a_prompt_a_row():
    """Ten rows of 16 + 16 slots at 16 bytes, three arrays of 5 logits a row; the larger rollout counts."""
    x = bytes_of(step_of(eval_dataset_id_or_path="rows.jsonl", eval_batch_size=10))
    assert x.evaluation == 10 * 32 * 16 + 10 * 5 * 12
    assert x.rollout == 448 + 908 + 224 + 256 + x.evaluation
    many = step_of("100000 x 1", eval_dataset_id_or_path="rows.jsonl", eval_batch_size=1000)
    assert find_remedies(many)[0][0] == {"eval_batch_size": 125}


def test_jax_takes_a_share_of_a_gpu(monkeypatch):
    monkeypatch.delenv(GPU_SHARE, raising=False)
    assert read_machine("h200").taken == 0.75 * 141e9
    assert read_machine("v5e").taken == read_machine("v5e").memory
    monkeypatch.setenv(GPU_SHARE, "0.9")
    assert read_machine("h200").taken == 0.9 * 141e9
    monkeypatch.setenv(GPU_SHARE, "90")
    with pytest.raises(ValueError, match="XLA_CLIENT_MEM_FRACTION must be a share of the memory"):
        gpu_share()


def test_fsdp_shards_what_it_divides():
    """The table's 5 rows and 18 scales stay whole, the layers' 84 weights are halved: 70."""
    x = bytes_of(step_of("1GB x 2", mesh_fsdp=2))
    assert (x.weights, x.gradients, x.moments) == (280, 280, 560 + 12)


def test_the_optimizer_changes_the_moments():
    """Lion has one of each weight, muon of 42 of a layer's 50, and two of the others. Adafactor: rows and columns of each matrix, all of a vector, and counters.

    A layer: q 2 × 4 and o 4 × 2 have 6 sums each, k and v 2 × 2 have 4 each, gate, up and down 2 × 3 have 5 each: 35 sums,
    a placeholder for each of the 7, 8 weights of norms with 2 placeholders for each of 4; outside: the table 5 × 2 has 7
    and 1, the last norm 2 and 2. Counters: one of each layer and one of the rest.
    """
    assert bytes_of(step_of(optim="lion")).moments == 448 + 12
    assert bytes_of(step_of(optim="sgd")).moments == 0
    counters = 1 + 3 + 1  # muon's with its three coefficients, and AdamW's
    assert bytes_of(step_of(optim="muon")).moments == 4 * (2 * (42 + 2 * 8 + counters) + 2 * 12 + counters)
    layer = 35 + 7 + 8 + 2 * 4
    assert bytes_of(step_of(optim="adafactor")).moments == 4 * (2 * layer + 8 + 4 + 3)


def test_types_and_adapters_change_weights_and_moments():
    """Adapters of rank 1 on q and v: 2 + 4 and 2 + 2 a layer, 20 in fp32 next to 112 in bf16, and a seed."""
    x = bytes_of(step_of(param_dtype="bfloat16", optim_dtype="bfloat16"))
    assert (x.weights, x.gradients, x.moments) == (224, 224, 448 + 12)
    x = bytes_of(step_of(use_peft=True, lora_r=1))
    assert (x.weights, x.gradients, x.moments) == (112 * 2 + 20 * 4 + 4, 80, 160 + 4)
    assert bytes_of(step_of(beta=0.1)).reference == 224
    assert bytes_of(step_of(beta=0.1, use_peft=True)).reference == 0  # the base with its adapters off


def test_nothing_shared_and_no_prompt_of_its_own_are_levels_without_tokens():
    x = bytes_of(step_of(data=DataLengths(10, 0, 4, True)))
    assert (x.preamble_cache, x.prompts_cache) == (0, 512)
    x = bytes_of(step_of(data=DataLengths(10, 10, 0, True)))
    assert (x.preamble_cache, x.prompts_cache) == (256, 0)


def test_a_mesh_must_have_the_plans_devices():
    with pytest.raises(ValueError, match="the number of the plan's devices, 8, got 3 · 1 · 1"):
        step_of("v5e-8", mesh_data=3)


def test_a_mesh_that_divides_no_such_machine_names_what_to_lower():
    with pytest.raises(ValueError, match=r"got 1 · 8 · 1; lower mesh_fsdp or mesh_tensor, .* must divide 4"):
        step_of("v5e-4", mesh_fsdp=8)


def test_a_remedy_can_be_run():
    """Four rows split into four micro-batches at most."""
    with pytest.raises(ValueError, match="micro_batches 8 cannot split 2 prompts × 2 generations"):
        step_of(micro_batches=8)
    for size in (3_000, 10_000, 30_000):
        for changes, _ in find_remedies(step_of(f"{size} x 1")):
            assert changes.get("micro_batches", 1) <= 4


def test_a_remedy_changes_the_verdict():
    data = DataLengths(100, 1000, 50, True)
    config, model = GRPOConfig(per_device_train_batch_size=8), PUBLISHED["Qwen3-0.6B"]
    step = plan_step(config, model, data, read_machine("12GB x 2"))
    assert not fits(bytes_of(step), step.machine)
    remedies = find_remedies(step)
    assert any("mesh_fsdp" in changes for changes, _ in remedies)
    for changes, peak in remedies:
        size = bytes_of(changed(step, changes))
        assert fits(size, step.machine)
        assert size.peak == peak


def test_remedies_are_measured_on_what_was_compiled():
    """Twice the estimate: what would have been enough is not."""
    data = DataLengths(100, 1000, 50, True)
    config, model = GRPOConfig(per_device_train_batch_size=8), PUBLISHED["Qwen3-0.6B"]
    step = plan_step(config, model, data, read_machine("12GB x 2"))
    (changes, peak), *_ = find_remedies(step)
    scaled = dict((str(c), size) for c, size in find_remedies(step, Temporary(2.0, 1.0)))
    assert scaled.get(str(changes), math.inf) > peak


def test_remat_is_the_remedy_for_activations():
    config = GRPOConfig(gradient_checkpointing=False, micro_batches=1)
    data = DataLengths(100, 6000, 50, True)
    step = plan_step(config, PUBLISHED["Qwen3-0.6B"], data, read_machine("40GB x 1"))
    assert not fits(bytes_of(step), step.machine)
    assert find_remedies(step)[0][0] == {"gradient_checkpointing": True}


def test_nothing_helps_where_nothing_can():
    step = plan_step(GRPOConfig(), PUBLISHED["Qwen3-8B"], DATA, read_machine("100MB x 1"))
    assert find_remedies(step) == []


def test_hours_follow_the_rates():
    """Twice the completions on twice the devices: only the shared preamble is spread thinner."""
    one, two = (step_of(name, PUBLISHED["Qwen3-0.6B"]) for name in ("h100", "h100-2"))
    hours, of_two = (step_hours(step, step.machine.rates) for step in (one, two))
    assert 0.5 * hours < of_two < hours * 1.001
    assert read_machine("80GB x 1").rates is None


def test_what_xla_refuses_does_not_fit():
    """XLA for a TPU does not compile what its memory cannot hold; it says how much that is."""
    refused = SimpleNamespace(
        compile=raising("the total memory required for HLO temporaries (28.50G) exceeds")
    )
    assert memory.temporary_bytes(refused) == 28.5 * 2**30
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        memory.temporary_bytes(SimpleNamespace(compile=raising("something else")))


def raising(message):
    def compile():
        raise jax.errors.JaxRuntimeError(message)

    return compile


def test_published_sizes_have_the_published_number_of_parameters():
    """Qwen's model cards, in billions."""
    billions = {name: round(cost.weights(cfg) / 1e9, 2) for name, cfg in PUBLISHED.items()}
    assert billions == {
        "Qwen2.5-0.5B": 0.49,
        "Qwen2.5-1.5B": 1.54,
        "Qwen2.5-3B": 3.09,
        "Qwen2.5-7B": 7.62,
        "Qwen3-0.6B": 0.6,
        "Qwen3-1.7B": 1.72,
        "Qwen3-4B": 4.02,
        "Qwen3-8B": 8.19,
    }
    norms = 4 * (2 * 128 + 2 * 32) + 128
    assert cost.weights(SCRATCH_SIZES) + norms == 877_440  # as make_tiny_checkpoint says


def test_an_unknown_model_asks_for_a_folder():
    with pytest.raises(ValueError, match=r"'other/model' are not known here: give a local folder"):
        model_sizes(GRPOConfig(model_name_or_path="other/model"))


def command(*arguments):
    argv = [sys.executable, "-m", "grpo_jax.train", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_prints_an_estimate_for_a_machine_that_nothing_compiles_for():
    ran = command("--config", "configs/default.yaml", "--plan", "h200")
    assert ran.returncode == 0, ran.stderr
    assert "Compiling" not in ran.stdout
    assert "Estimate: it fits" in ran.stdout
    assert "minutes for 1800 updates" in ran.stdout  # 1,200 rows / 2 prompts × 3 epochs


@pytest.mark.slow
def test_the_command_compiles_for_this_cpu_and_for_more_devices_of_it():
    ran = command("--config", "configs/smoke.yaml", "--plan", "cpu-2")
    assert ran.returncode == 0, ran.stderr
    assert "Compiling the update and decode for 2 × cpu" in ran.stdout
    assert "\nit fits" in ran.stdout and "Estimate: it" not in ran.stdout


@pytest.mark.slow
def test_decode_of_a_deep_model_is_linear_in_its_layers():
    """Six layers, compiled whole and from two and four."""
    step = step_of("cpu", dataclasses.replace(TINY, D=64, F=128, H=16, L=6), max_grpo_completion_length=255)
    whole = memory.temporary_bytes(memory.lower_decode(step, make_mesh(), L=6))
    assert memory.compile_step(step, memory.devices_of(step.machine)).decode == pytest.approx(whole, rel=0.05)


SMALL = "qwen3 2000 128 384 4 4 2 32"  # V D F L N K H
SMOKE = "qwen3 700 128 384 4 4 2 32"
MANY_HEADS = "qwen3 2000 256 384 4 8 8 32"
# model, (P, G, T0, T1, budget), remat, micro-batches
ONE_DEVICE = [
    (SMALL, (4, 8, 256, 16, 63), True, 1),
    (SMALL, (4, 8, 256, 16, 63), False, 1),
    (SMALL, (2, 4, 512, 64, 255), True, 1),  # decode leaves finished rows out
    (SMALL, (2, 4, 512, 64, 255), True, 4),
    (SMOKE, (2, 4, 320, 32, 79), False, 1),  # the smoke run's
    (SMOKE, (16, 8, 320, 32, 63), True, 1),  # the quickstart's
    ("qwen3 40000 128 384 2 4 2 32", (1, 8, 512, 64, 63), True, 1),  # the head outweighs the layers
    ("qwen3 2000 512 3072 3 8 4 64", (4, 8, 3072, 64, 191), True, 1),  # the MLP would outweigh the others
]
EIGHT_DEVICES = [(SMALL, (4, 8, 512, 64, 63), True, 1), (MANY_HEADS, (4, 8, 512, 64, 63), True, 1)]
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "cases"), [((1, 1, 1), ONE_DEVICE), *((mesh, EIGHT_DEVICES) for mesh in MESHES)]
)
def test_the_estimate_of_update_and_decode_agrees_with_xla(mesh, cases):
    """Within 15 %, with what lies on the device meanwhile; what the state holds is no part of decode."""
    # more threads than devices: eight programs that wait for one another on two would wait forever
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    texts = [json.dumps([mesh, *case]) for case in cases]
    argv = [sys.executable, "tests/xla_memory.py", *texts]
    ran = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for case, line in zip(cases, ran.stdout.splitlines(), strict=True):
        estimated, compiled = json.loads(line)
        assert estimated == pytest.approx(compiled, rel=0.15), case
