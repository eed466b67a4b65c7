"""The commands with --use_peft: what a run leaves and saves, resuming, exports, evaluation, the cold start."""

import functools
import json
import shutil
from unittest import mock

import jax
import launch
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax import evaluate, export, sft
from grpo_jax.models import hf
from grpo_jax.run.checkpoint import Checkpoints
from grpo_jax.run.weights import restore_adapters

SCALE = 5 / 2  # alpha / rank
OPTIONS = {
    "use_peft": True,
    "lora_r": 2,
    "lora_alpha": 5,
    "lora_dropout": 0.1,
    "lora_target_modules": ["o_proj", "up_proj"],
    "learning_rate": 1e-2,
    "beta": 0.1,
    "param_dtype": "bfloat16",  # of weights that are trained, which neither base nor adapters are
}


@functools.cache
def whole() -> launch.Ran:
    """The small run with adapters and a reference, uninterrupted; `loads` are its reads of a model's weights."""
    with mock.patch.object(hf, "load_params", wraps=hf.load_params) as load:
        ran = launch.small_run(launch.FOLDER / "lora", **OPTIONS)
    assert ran.status == 0, ran.err
    whole.loads = load.call_count
    return ran


def merged_by_numpy(base, adapter, scale=SCALE):
    """Every tensor of a base's folder, with scale·B·A of a PEFT folder added to its weights."""
    tensors, pairs = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in pairs if name.endswith("lora_A.weight")]:
        A, B = (pairs[name.replace("lora_A", x)].astype(np.float64) for x in ("lora_A", "lora_B"))
        weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
        tensors[weight] = tensors[weight] + scale * B @ A
    return tensors, len(pairs) // 2


def assert_merged(model, base, adapter, modules, scale=SCALE):
    """`model` is base + adapters where there are adapters, and the base bit for bit elsewhere."""
    want, pairs = merged_by_numpy(base, adapter, scale)
    got, before = load_file(model / "model.safetensors"), load_file(base / "model.safetensors")
    assert pairs == 2 * len(modules)  # two layers
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name], rtol=0, atol=1e-6)
        adapted = any(module in name for module in modules)
        assert (x == before[name]).all() != adapted, name


def test_a_run_leaves_the_merged_model_and_a_peft_folder():
    folder = whole().folder
    assert_merged(folder / "model", launch.small_model(), folder / "adapter", ("o_proj", "up_proj"))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(launch.small_model())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 5, 0.1)
    assert config["target_modules"] == ["o_proj", "up_proj"]


def test_the_reference_is_the_base_with_adapters_off_and_not_a_second_copy():
    """B starts at zero, and dropout of what is multiplied by zero changes nothing: no KL at first."""
    first, *_, last = whole().jsonl("metrics.jsonl")
    assert first["kl"] < 1e-10
    assert last["kl"] > 1e-4
    assert whole.loads == 1


def test_checkpoints_hold_adapters_alone():
    """Restoring refuses a step that holds anything else than is asked for."""
    with Checkpoints(whole().folder / "checkpoints") as checkpoints:
        adapters, config = restore_adapters(checkpoints, 4, on_one_device)
    assert adapters.keys() == {"o_lora_a", "o_lora_b", "up_lora_a", "up_lora_b"}
    assert (config.rank, config.alpha, config.modules) == (2, 5.0, ("o_proj", "up_proj"))


def on_one_device(tree):
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)


def resumed(folder, **changes):
    step = whole().folder / "checkpoints" / "2"
    return launch.small_run(folder, **OPTIONS | {"resume_from_checkpoint": step} | changes)


def test_rule_7_resume_is_exact_with_adapters_and_their_dropout(tmp_path):
    again = resumed(tmp_path / "run")
    assert again.status == 0, again.err
    assert [line["step"] for line in again.jsonl("metrics.jsonl")] == [3, 4]
    assert again.weights() == whole().weights()
    adapter = "adapter/adapter_model.safetensors"
    assert (again.folder / adapter).read_bytes() == (whole().folder / adapter).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 4}, "lora_alpha was 5.0 there and is 4.0 in this run"),
        ({"use_peft": False}, "lora_r was 2 there and is None in this run (None: without use_peft)"),
        ({"lora_target_modules": "o_proj"}, "lora_target_modules was ['o_proj', 'up_proj'] there and is"),
    ],
)
def test_resuming_with_other_adapters_is_refused(tmp_path, changes, message):
    ran = resumed(tmp_path / "run", **changes)
    assert ran.status == 2
    assert message in ran.err


def test_resuming_on_another_base_is_refused(tmp_path):
    other = shutil.copytree(launch.small_model(), tmp_path / "other")
    ran = resumed(tmp_path / "run", model_name_or_path=other)
    assert ran.status == 2
    assert f"trained on {launch.small_model()}, this run's model is {other}" in ran.err


def run_export(*flags):
    return launch.call(export.main, flags, whole().folder)


def test_exports_of_the_last_step_are_what_training_left(tmp_path):
    step = whole().folder / "checkpoints" / "4"
    for flags, name in (((), "model"), (("--adapter",), "adapter")):
        ran = run_export("--checkpoint", step, "--to", tmp_path / name, *flags)
        assert ran.status == 0, ran.err
        left = {path.name: path.read_bytes() for path in (whole().folder / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == left


def test_a_run_without_adapters_exports_none(tmp_path):
    run = launch.whole().folder
    ran = run_export("--checkpoint", 4, "--output_dir", run, "--to", tmp_path / "adapter", "--adapter")
    assert ran.status == 2
    assert f"{run / 'checkpoints/4'} holds whole weights and no adapters" in ran.err


def test_evaluating_a_checkpoint_is_evaluating_its_export(tmp_path):
    def samples(model, out):
        changes = {"model_name_or_path": model, "eval_dataset_id_or_path": launch.evaluation_rows()}
        ran = launch.call(evaluate.main, launch.options(out, **changes), out)
        assert ran.status == 0, ran.err
        return ran.samples()

    of_step = samples(whole().folder / "checkpoints" / "4", tmp_path / "a")
    assert of_step == samples(whole().folder / "model", tmp_path / "b")
    assert of_step == samples(whole().folder / "adapter", tmp_path / "c")
    assert of_step != samples(launch.small_model(), tmp_path / "d")


def test_adapters_do_not_start_from_a_checkpoint(tmp_path):
    step = launch.whole().folder / "checkpoints" / "4"
    ran = launch.small_run(tmp_path / "run", **OPTIONS, model_name_or_path=step)
    assert ran.status == 2
    assert f"make it a folder with python -m grpo_jax.export --checkpoint {step}" in ran.err
    ran = launch.small_run(tmp_path / "run", **OPTIONS, model_name_or_path=whole().folder / "adapter")
    assert ran.status == 2
    assert f"got the adapters {whole().folder / 'adapter'}; name the merged model" in ran.err


COLD = {
    "lora_target_modules": "q_proj",
    "lora_dropout": 0,
    "beta": 0,
    "sft_max_steps": 2,  # the warm-up's first has rate zero
    "sft_learning_rate": 0.1,
}


@pytest.mark.slow
def test_the_cold_start_trains_adapters_and_grpo_others_on_top(tmp_path):
    """Also with two updates a batch, in two micro-batches."""
    several = {"cold_start": True, "num_iterations": 2, "micro_batches": 2, "max_steps": 2}
    ran = launch.small_run(tmp_path / "run", **OPTIONS | COLD | several)
    assert ran.status == 0, ran.err
    assert [line["step"] for line in ran.jsonl("metrics.jsonl")] == [2]
    before, after = (
        load_file(f / "model.safetensors") for f in (launch.small_model(), ran.folder / "cold_start")
    )
    changed = {name for name, x in before.items() if not (after[name] == x).all()}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert_merged(ran.folder / "model", ran.folder / "cold_start", ran.folder / "adapter", ("q_proj",))
    config = json.loads((ran.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(ran.folder / "cold_start")


@pytest.mark.slow
def test_the_sft_command_leaves_both_folders(tmp_path):
    ran = launch.call(sft.main, launch.options(tmp_path / "run", **OPTIONS | COLD), tmp_path / "run")
    assert ran.status == 0, ran.err
    assert_merged(ran.folder / "model", launch.small_model(), ran.folder / "adapter", ("q_proj",))
