"""What `--plan` reckons: by hand for a tiny model, and against XLA's own memory analysis."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.models import cost
from grpo_jax.models.qwen import ModelConfig
from grpo_jax.preflight.plan import find_remedies, fits, plan_step, step_hours
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
# 30 weights of matrices and 6 of norms a layer, 10 of the table, 2 of the last norm: 84
TINY = ModelConfig("qwen3", V=5, D=2, F=3, L=2, N=2, K=1, H=1, rope_theta=1e4, norm_eps=1e-6, tied=True)
DATA = DataLengths(rows=10, preamble=10, rest=4, exact=True)
OPTIONS = {"per_device_train_batch_size": 4, "num_generations": 2, "max_grpo_completion_length": 15}


def plan(machine="1GB x 1", model=TINY, data=DATA, **options):
    return plan_step(GRPOConfig(**(OPTIONS | options)), model, data, read_machine(machine))


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
    assert (machine.count, machine.device.memory) == (count, memory)


@pytest.mark.parametrize(
    "text", ["v9-8", "80GB", "80KB x 8", "8", "v5e-0", "v5p-3", "80GB x 0", "cpu-0", "1.2.3 x 4"]
)
def test_another_text_names_the_machines_there_are(text):
    with pytest.raises(ValueError, match="plan must be one of v4, v5e, v5p, v6e, h100, h200 or cpu"):
        read_machine(text)


def test_the_cpu_has_this_machines_memory():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert read_machine("cpu").device.memory == memory
    assert read_machine("cpu-4").device.memory == memory / 4


def test_bytes_by_hand():
    """84 weights; 2 · 2 · 2 = 8 bytes a slot; 16, 2 · 16 and 4 · 16 slots; 64 completion tokens."""
    step = plan()
    assert step.lengths == cost.Lengths(P=2, G=2, T0=16, T1=16, T2=16)
    assert (step.sizes, step.micro_batches) == ((1, 1, 1), 1)
    x = step.bytes
    assert (x.weights, x.gradients, x.moments, x.rollout_copy) == (336, 336, 672, 168)
    assert (x.preamble_cache, x.prompts_cache, x.own_cache) == (128, 256, 512)
    assert (x.decode, x.evaluation) == (240, 0)
    # three arrays of 64 positions' 5 logits; the head and its gradient in bf16
    assert x.head == 3 * 64 * 5 * 4 + 2 * 10 * 2
    # 112 tokens of 2 layers · (2 + 2) bf16 values and 2 in fp32
    assert x.kept_activations == 112 * 2 * (4 * 2 + 2 * 4)
    # 18 values of 48 shared tokens, 48 of the completions' 64, four blocks of 2 heads' scores
    assert x.working_set == 4 * (18 * 48 + 48 * 64 + 4 * 2 * 64 * 16)
    assert x.update == 336 + 672 + 336 + 3584 + x.working_set
    assert x.rollout == 336 + 672 + 168 + 128 + 256 + 512 + 240


def test_an_evaluation_has_a_prompt_a_row():
    """Ten rows of 16 + 16 slots at 8 bytes, three arrays of 5 logits a row; the larger rollout counts."""
    x = plan(eval_dataset_id_or_path="rows.jsonl", eval_batch_size=10).bytes
    assert x.evaluation == 10 * 32 * 8 + 10 * 5 * 12
    assert x.rollout == 336 + 672 + 168 + 128 + x.evaluation
    many = GRPOConfig(**OPTIONS, eval_dataset_id_or_path="rows.jsonl", eval_batch_size=1000)
    assert find_remedies(many, TINY, DATA, read_machine("100000 x 1"))[0][0] == {"eval_batch_size": 250}


def test_decode_on_a_cpu_holds_the_rows_that_go_on_twice():
    """Half of the rows, two, with 16 slots of a prompt and 129 of their own, at 16 bytes in fp32.

    The keys of the trunk's 48 slots, at 8 bytes, are there twice as well.
    """
    x = plan("cpu", max_grpo_completion_length=128).bytes
    assert x.decode == 240 + 48 * 8 + 2 * (16 + 129) * 16
    assert plan("cpu", max_grpo_completion_length=127).bytes.decode == 240 + 48 * 8


def test_jax_takes_a_share_of_a_gpu(monkeypatch):
    monkeypatch.delenv(GPU_SHARE, raising=False)
    assert read_machine("h200").memory == 0.75 * 141e9
    assert read_machine("v5e").memory == read_machine("v5e").device.memory
    monkeypatch.setenv(GPU_SHARE, "0.9")
    assert read_machine("h200").memory == 0.9 * 141e9
    with pytest.raises(ValueError, match="XLA_CLIENT_MEM_FRACTION must be a share of the memory"):
        gpu_share({GPU_SHARE: "90"})


def test_fsdp_shards_what_it_divides():
    """The table's 5 rows and 14 scales stay whole, the layers' 60 weights are halved: 54."""
    x = plan("1GB x 2", mesh_fsdp=2).bytes
    assert (x.weights, x.gradients, x.moments) == (216, 216, 432)


def test_types_and_adapters_change_weights_and_moments():
    """Adapters of rank 1 on q and v: 2 + 2 and 2 + 1 a layer, 14 in fp32 beside 84 in bf16."""
    x = plan(param_dtype="bfloat16", optim_dtype="bfloat16").bytes
    assert (x.weights, x.gradients, x.moments) == (168, 168, 336)
    x = plan(use_peft=True, lora_r=1).bytes
    assert (x.weights, x.gradients, x.moments) == (84 * 2 + 14 * 4, 56, 112)
    assert plan(beta=0.1).bytes.weights == 336 + 168


def test_a_mesh_must_have_the_plans_devices():
    with pytest.raises(ValueError, match="the plan's 8 devices, got 3 · 1 · 1"):
        plan("v5e-8", mesh_data=3)


def test_a_mesh_that_divides_no_such_machine_names_what_to_lower():
    with pytest.raises(ValueError, match=r"got 1 · 8 · 1; lower mesh_fsdp or mesh_tensor: .* must divide 4"):
        plan("v5e-4", mesh_fsdp=8)


def test_a_remedy_can_be_run():
    """Four rows split into four micro-batches at most."""
    with pytest.raises(ValueError, match="micro_batches 8 cannot split 2 prompts × 2 generations"):
        plan(micro_batches=8)
    for memory in range(1_000, 60_000, 1_000):
        for changes, _ in find_remedies(GRPOConfig(**OPTIONS), TINY, DATA, read_machine(f"{memory} x 1")):
            assert changes.get("micro_batches", 1) <= 4


def test_a_remedy_changes_the_verdict():
    model, data = PUBLISHED["Qwen3-0.6B"], DataLengths(100, 1000, 50, True)
    config, machine = GRPOConfig(per_device_train_batch_size=8), read_machine("12GB x 2")
    assert not fits(plan_step(config, model, data, machine), machine)
    remedies = find_remedies(config, model, data, machine)
    assert any("mesh_fsdp" in changes for changes, _ in remedies)
    for changes, peak in remedies:
        step = plan_step(GRPOConfig(**({"per_device_train_batch_size": 8} | changes)), model, data, machine)
        assert fits(step, machine)
        assert step.bytes.peak == peak


def test_remat_is_the_remedy_for_activations():
    model, data = PUBLISHED["Qwen3-0.6B"], DataLengths(100, 6000, 50, True)
    options = {"gradient_checkpointing": False, "micro_batches": 1}
    machine = read_machine("40GB x 1")
    assert not fits(plan_step(GRPOConfig(**options), model, data, machine), machine)
    assert find_remedies(GRPOConfig(**options), model, data, machine)[0][0] == {
        "gradient_checkpointing": True
    }


def test_nothing_helps_where_nothing_can():
    config, machine = GRPOConfig(), read_machine("100MB x 1")
    assert find_remedies(config, PUBLISHED["Qwen3-8B"], DATA, machine) == []


def test_hours_follow_the_rates():
    config, model = GRPOConfig(**OPTIONS), PUBLISHED["Qwen3-0.6B"]
    hours = {}
    for name in ("h100", "h100-2", "80GB x 1"):
        machine = read_machine(name)
        hours[name] = step_hours(config, model, plan_step(config, model, DATA, machine), machine)
    assert hours["80GB x 1"] is None
    # twice the completions on twice the devices: only the shared preamble is spread thinner
    assert 0.5 * hours["h100"] < hours["h100-2"] < hours["h100"] * 1.001


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


COMMAND = """
import sys
from grpo_jax.train import main
status = main(sys.argv[1:])
import jax._src.xla_bridge as bridge
print("backends", bridge.backends_are_initialized())
sys.exit(status)
"""


def test_the_command_prints_a_plan_and_starts_no_backend():
    arguments = ["--config", "configs/default.yaml", "--plan", "v5e-8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "Estimate: it fits" in ran.stdout
    assert "hours for 225 updates" in ran.stdout  # 1,200 rows / 16 prompts × 3 epochs
    assert "backends False" in ran.stdout


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


def xla_bytes(mesh, cases, devices):
    """What `xla_memory.py` prints: (update, decode) of each case."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    # more threads than devices: eight programs that wait for one another on two would wait forever
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "NPROC": "32",
    }
    texts = [json.dumps([mesh, *case]) for case in cases]
    command = [sys.executable, "tests/xla_memory.py", *texts]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "cases"), [((1, 1, 1), ONE_DEVICE), *((mesh, EIGHT_DEVICES) for mesh in MESHES)]
)
def test_update_and_decode_on_the_cpu_agree_with_xla(mesh, cases):
    """Within 15 %; what the state holds is an argument of the update, and no part of decode."""
    data, fsdp, tensor = mesh
    figures = xla_bytes(mesh, cases, math.prod(mesh))
    for (sizes, (P, G, T0, T1, budget), remat, parts), measured in zip(cases, figures, strict=True):
        kind, *numbers = sizes.split()
        x = plan(
            f"cpu-{math.prod(mesh)}",
            ModelConfig(kind, *map(int, numbers), rope_theta=1e4, norm_eps=1e-6, tied=True),
            DataLengths(100, T0, T1, True),
            per_device_train_batch_size=P * G // (data * fsdp),
            num_generations=G,
            max_grpo_completion_length=budget,
            gradient_checkpointing=remat,
            micro_batches=parts,
            mesh_data=data,
            mesh_fsdp=fsdp,
            mesh_tensor=tensor,
        ).bytes
        planned = [x.update, x.rollout - x.weights - x.moments]
        assert planned == pytest.approx(measured, rel=0.15), (sizes, remat, parts)
