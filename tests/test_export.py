"""Any saved step becomes an HF folder; what is not there is named with what is."""

import json
import shutil

import launch
import pytest
from safetensors.numpy import load_file

from grpo_jax import export


def run_export(*flags) -> launch.Ran:
    return launch.call(export.main, flags, launch.whole().folder)


@pytest.fixture
def run():
    """The output_dir of a run with checkpoints 1 to 4; its exports are removed again."""
    folder = launch.whole().folder
    yield folder
    shutil.rmtree(folder / "export", ignore_errors=True)


def test_the_last_step_is_the_model_that_training_left(run):
    ran = run_export("--checkpoint", launch.UPDATES, "--output_dir", run)
    assert ran.status == 0, ran.err
    folder = run / "export" / "step_4"
    assert ran.out == f"Written: {folder}\n"
    assert {path.name for path in folder.iterdir()} == {path.name for path in (run / "model").iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (run / "model" / path.name).read_bytes()


def test_every_step_has_weights_of_its_own(run, tmp_path):
    weights = {launch.whole().weights()}
    for step in (1, 2, 3):
        assert run_export("--checkpoint", step, "--output_dir", run, "--to", tmp_path / str(step)).status == 0
        weights.add((tmp_path / str(step) / "model.safetensors").read_bytes())
    assert len(weights) == 4
    assert not (run / "export").exists()


def test_the_newest_step_and_a_steps_folder_can_be_named(run, tmp_path):
    assert run_export("--checkpoint", "latest", "--output_dir", run, "--to", tmp_path / "a").status == 0
    assert run_export("--checkpoint", run / "checkpoints" / "4", "--to", tmp_path / "b").status == 0
    for folder in ("a", "b"):
        assert (tmp_path / folder / "model.safetensors").read_bytes() == launch.whole().weights()


def test_a_steps_folder_is_that_step_wherever_it_lies(run, tmp_path):
    """A copy under another name holds step 4; beside it lies another run's step 4 in `checkpoints`."""
    for name, step in (("kept", 2), ("checkpoints", 4)):
        shutil.copytree(run / "checkpoints" / str(step), tmp_path / "run" / name / "4")
    assert run_export("--checkpoint", tmp_path / "run/kept/4", "--to", tmp_path / "a").status == 0
    assert run_export("--checkpoint", 2, "--output_dir", run, "--to", tmp_path / "b").status == 0
    found, expected = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert found == expected != launch.whole().weights()


def test_output_dir_is_not_the_folder_to_write(run, tmp_path):
    ran = run_export("--checkpoint", run / "checkpoints/4", "--output_dir", tmp_path / "to")
    assert ran.status == 2
    assert "--to names the folder to write" in ran.err
    assert not (run / "export").exists()


def test_shards_hold_the_tensors_of_one_file(run, tmp_path):
    flags = ("--checkpoint", 4, "--output_dir", run, "--max_shard_size", "50KB", "--to", tmp_path / "m")
    assert run_export(*flags).status == 0
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())["weight_map"]
    whole = load_file(run / "model/model.safetensors")
    assert index.keys() == whole.keys()
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert (load_file(tmp_path / "m" / file)[name] == whole[name]).all()


def test_a_size_that_is_none_is_an_error_before_anything_is_read(run):
    ran = run_export("--checkpoint", 4, "--output_dir", run, "--max_shard_size", "5")
    assert ran.status == 2
    assert "max_shard_size must be a number above 0 and its unit KB, MB, GB or TB, as 5GB" in ran.err
    assert not (run / "export").exists()


def test_a_step_that_is_not_there_is_named_with_those_that_are(run):
    ran = run_export("--checkpoint", 7, "--output_dir", run)
    assert ran.status == 2
    assert f"no checkpoint of step 7 in {run / 'checkpoints'}, which holds [1, 2, 3, 4]" in ran.err


@pytest.mark.parametrize("step", ["latest", "3"])
def test_a_folder_without_checkpoints_is_named_and_not_made(tmp_path, step):
    ran = run_export("--checkpoint", step, "--output_dir", tmp_path / "none")
    assert ran.status == 2
    assert str(tmp_path / "none/checkpoints") in ran.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "flags", [("newest", "--output_dir", "runs"), ("3",), ("-1", "--output_dir", "runs")]
)
def test_what_is_no_step_says_how_to_name_one(flags):
    ran = run_export(f"--checkpoint={flags[0]}", *flags[1:])
    assert ran.status == 2
    assert "must be a step number or latest together with --output_dir RUN, or a step's folder" in ran.err


def test_a_run_whose_source_model_is_gone_is_an_error(tmp_path, run):
    """The config and tokenizer come from the folder that training started from."""
    folder = shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    meta = folder / "4" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace(str(launch.small_model()), str(tmp_path / "gone")))
    ran = run_export("--checkpoint", 4, "--output_dir", tmp_path / "run")
    assert ran.status == 2
    assert f"model folder {tmp_path / 'gone'} lacks config.json" in ran.err
