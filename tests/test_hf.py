"""Checkpoints in the published layout: in and out bit for bit, and errors that name the tensor."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import CASES, QWEN2, QWEN3, load, random_tensors, write_checkpoint
from safetensors.numpy import load_file, save_file

from grpo_jax.files import OutputError
from grpo_jax.models.hf import read_config, save_model, whole_folder
from grpo_jax.models.qwen import check_params

ROOT = Path(__file__).parents[1]
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
OTHER_FILES = {
    "generation_config.json": '{"temperature":0.7}',
    "tokenizer.json": '{"version": "1.0" }\n',
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "#version: 0.2\r\nĠ t\r\n",
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def saved(folder):
    """Every tensor of a folder, by name, and the files that hold them."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}, files


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, strict=True)


def test_every_leaf_is_read_as_the_published_layout_means_it(case, tmp_path):
    """x · leaf, with separate heads and layers, equals torch's `x @ weight.T + bias`."""
    tensors = random_tensors(case)
    cfg, params = load(write_checkpoint(tmp_path, case))
    check_params(cfg, params)
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["model.norm.weight"])
    assert ("head" in params) == (not case["tie_word_embeddings"])
    rng = np.random.default_rng(0)
    x, o, f = (rng.normal(size=n).astype(np.float32) for n in (cfg.D, cfg.N * cfg.H, cfg.F))
    for i in range(cfg.L):
        layer = jax.tree.map(lambda w, i=i: np.asarray(w)[i], params["layers"])
        hf = {n.split(".", 3)[3]: w for n, w in tensors.items() if n.startswith(f"model.layers.{i}.")}
        attention, mlp = layer["attention"], layer["mlp"]
        for name in "qkv":
            want = hf[f"self_attn.{name}_proj.weight"] @ x
            heads = np.einsum("d,dnh->nh", x, attention[name])
            np.testing.assert_allclose(heads.ravel(), want, rtol=1e-4, atol=1e-5)
            if cfg.qkv_bias:
                bias = hf[f"self_attn.{name}_proj.bias"]
                np.testing.assert_array_equal(attention[f"{name}_bias"].ravel(), bias)
        got = np.einsum("nh,nhd->d", o.reshape(cfg.N, cfg.H), attention["o"])
        np.testing.assert_allclose(got, hf["self_attn.o_proj.weight"] @ o, rtol=1e-4, atol=1e-5)
        for name, v in (("gate", x), ("up", x), ("down", f)):
            np.testing.assert_allclose(v @ mlp[name], hf[f"mlp.{name}_proj.weight"] @ v, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(layer["attention_norm"]["scale"], hf["input_layernorm.weight"])
        np.testing.assert_array_equal(layer["mlp_norm"]["scale"], hf["post_attention_layernorm.weight"])
        if cfg.qk_norm:
            np.testing.assert_array_equal(attention["q_norm"]["scale"], hf["self_attn.q_norm.weight"])
            np.testing.assert_array_equal(attention["k_norm"]["scale"], hf["self_attn.k_norm.weight"])


def test_round_trip_is_bit_for_bit(case, tmp_path):
    source = write_checkpoint(tmp_path / "source", case)
    cfg, params = load(source)
    save_model(tmp_path / "model", params, cfg, source)
    tensors, files = saved(tmp_path / "model")
    assert_same_tensors(tensors, random_tensors(case))
    assert [file.name for file in files] == [WEIGHTS] and not (tmp_path / "model" / INDEX).exists()


def test_export_above_max_shard_size_is_several_files_with_an_index(case, tmp_path):
    source = write_checkpoint(tmp_path / "source", case)
    cfg, params = load(source)
    save_model(tmp_path / "model", params, cfg, source, max_shard_size="30KB")
    tensors, files = saved(tmp_path / "model")
    assert len(files) > 2
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 30_000
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    again = load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again[1], params)
    save_model(tmp_path / "one", again[1], cfg, tmp_path / "model")  # the old index is not copied
    assert not (tmp_path / "one" / INDEX).exists()
    assert_same_tensors(saved(tmp_path / "one")[0], random_tensors(case))


def test_config_and_tokenizer_are_the_sources_byte_for_byte(tmp_path):
    source = write_checkpoint(tmp_path / "source", QWEN3)
    for name, text in OTHER_FILES.items():
        (source / name).write_bytes(text.encode())
    (source / "pytorch_model.bin").write_bytes(b"not ours")
    cfg, params = load(source)
    save_model(tmp_path / "model", params, cfg, source)
    assert {f.name for f in (tmp_path / "model").iterdir()} == {"config.json", WEIGHTS, *OTHER_FILES}
    for name in ("config.json", *OTHER_FILES):
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_on_disk_becomes_float32(dtype, tmp_path):
    tensors = {name: x.astype(dtype) for name, x in random_tensors(QWEN2).items()}
    _, params = load(write_checkpoint(tmp_path / "half", QWEN2, tensors))
    widened = {name: x.astype(np.float32) for name, x in tensors.items()}
    _, want = load(write_checkpoint(tmp_path / "widened", QWEN2, widened))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, params, want)


@pytest.mark.slow
def test_loading_half_a_billion_weights_takes_less_than_a_tensor_more_than_they_do():
    """At Qwen2.5-0.5B's shapes; leaves stacked on the host took 6.7 times the embedding."""
    command = [sys.executable, ROOT / "benchmarks/load.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "Loaded 494,032,768 parameters" in out
    assert 0 < float(re.search(r"^ratio (.*)$", out, re.MULTILINE)[1]) < 1.2, out


TYPES = {"bfloat16": jnp.bfloat16, "float16": np.float16, "float32": np.float32}


def typed_source(folder, stored, key="torch_dtype"):
    """A checkpoint whose config names the type of its tensors; `mixed` has float32 norms."""
    norms = np.float32 if stored == "mixed" else TYPES[stored]
    others = jnp.bfloat16 if stored == "mixed" else TYPES[stored]
    tensors = {n: x.astype(norms if "norm" in n else others) for n, x in random_tensors(QWEN3).items()}
    config = QWEN3 | {key: np.dtype(others).name}
    return write_checkpoint(folder, config, tensors), tensors


@pytest.mark.parametrize("stored", [*TYPES, "mixed"])
def test_an_untrained_export_has_the_very_tensors_and_types_of_the_source(stored, tmp_path):
    """Although the weights were float32 in between."""
    source, tensors = typed_source(tmp_path / "source", stored)
    cfg, params = load(source)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    save_model(tmp_path / "model", params, cfg, source)
    assert_same_tensors(saved(tmp_path / "model")[0], tensors)
    assert (tmp_path / "model/config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_trained_weights_are_not_rounded_to_the_sources_type_and_the_config_says_so(stored, key, tmp_path):
    """The last bit of one weight of the last tensor is enough."""
    source, tensors = typed_source(tmp_path / "source", stored, key)
    cfg, params = load(source)
    scale = params["norm"]["scale"]
    params["norm"]["scale"] = scale.at[0].set(jnp.nextafter(scale[0], 2.0))
    save_model(tmp_path / "model", params, cfg, source)
    got, want = saved(tmp_path / "model")[0], {n: x.astype(np.float32) for n, x in tensors.items()}
    want["model.norm.weight"][0] = np.nextafter(want["model.norm.weight"][0], np.float32(2))
    assert_same_tensors(got, want)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "model"))
    assert after == before | {key: "float32"}


def test_bf16_weights_of_a_float32_source_stay_bf16_and_the_config_says_so(tmp_path):
    source, tensors = typed_source(tmp_path / "source", "float32")
    cfg, params = load(source)
    save_model(tmp_path / "model", jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), cfg, source)
    assert_same_tensors(saved(tmp_path / "model")[0], {n: x.astype(jnp.bfloat16) for n, x in tensors.items()})
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_model_can_be_written_when_its_sources_weights_are_gone(tmp_path):
    source, tensors = typed_source(tmp_path / "source", "bfloat16")
    cfg, params = load(source)
    (source / WEIGHTS).unlink()
    save_model(tmp_path / "model", params, cfg, source)
    assert_same_tensors(saved(tmp_path / "model")[0], {n: x.astype(np.float32) for n, x in tensors.items()})


def test_a_tied_checkpoint_may_hold_its_head_twice(tmp_path):
    config = CASES["qwen3-tied"]
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = write_checkpoint(tmp_path / "source", config, tensors)
    cfg, params = load(source)
    assert "head" not in params
    save_model(tmp_path / "model", params, cfg, source)
    assert "lm_head.weight" not in saved(tmp_path / "model")[0]


def test_a_head_that_differs_from_the_embedding_is_not_dropped(tmp_path):
    """As of a fine-tune that untied them and left config.json as it was."""
    config = CASES["qwen3-tied"]
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match="set tie_word_embeddings to false there"):
        load(write_checkpoint(tmp_path, config, tensors))


def test_a_model_can_be_written_when_another_one_has_its_sources_place(tmp_path):
    source = write_checkpoint(tmp_path / "source", QWEN2)
    cfg, params = load(source)
    write_checkpoint(source, QWEN2 | {"num_hidden_layers": 1})
    save_model(tmp_path / "model", params, cfg, source)
    assert len(saved(tmp_path / "model")[0]) == len(random_tensors(QWEN2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 4}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim even"),
        ({"model_type": ["qwen2"]}, "model_type must be one of"),
        (
            {"rope_scaling": {"type": "yarn", "factor": float("inf"), "original_max_position_embeddings": 9}},
            "factor must be a number >= 1, got inf",
        ),
    ],
)
def test_sizes_that_no_model_has_are_named(change, message, tmp_path):
    write_checkpoint(tmp_path, QWEN2 | change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path)


def broken(change):
    """The tensors of a good checkpoint, changed."""
    tensors = random_tensors(QWEN2)
    change(tensors)
    return tensors


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"the tensor {Q} (48, 48) is missing"),
        (lambda t: t.pop("lm_head.weight"), "the tensor lm_head.weight (128, 48) is missing"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32)}),
            "the tensor model.layers.2.mlp.up_proj.weight is not part of this architecture",
        ),
        (
            lambda t: t.update({Q: np.ones((48, 48), np.float64)}),
            f"model.safetensors: the tensor {Q} must be stored as one of F32, F16, BF16, got F64",
        ),
        (
            lambda t: t.update({Q: np.ones((40, 48), np.float32)}),
            f"the tensor {Q} must have shape (48, 48), got (40, 48)",
        ),
    ],
)
def test_a_wrong_tensor_is_an_error_that_names_it(change, message, tmp_path):
    folder = write_checkpoint(tmp_path, QWEN2, broken(change))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}(: |/){re.escape(message)}"):
        load(folder)


@pytest.mark.parametrize("size", [4, 1000, -1])
def test_a_truncated_file_is_an_error_that_names_it(size, tmp_path):
    """In the length, in the header, in the last tensor."""
    path = write_checkpoint(tmp_path, QWEN2) / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a whole safetensors file")):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_an_error_that_names_it(name, tmp_path):
    write_checkpoint(tmp_path, QWEN2)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"model folder {tmp_path} lacks {name}")):
        load(tmp_path)


def sharded(folder):
    """A model in several files with an index."""
    source = write_checkpoint(folder.with_name("source"), QWEN2)
    cfg, params = load(source)
    save_model(folder, params, cfg, source, max_shard_size="30KB")


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    sharded(tmp_path / "model")
    lost = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(lost.name)):
        load(tmp_path / "model")


def test_a_damaged_index_is_an_error_that_names_it(tmp_path):
    source = write_checkpoint(tmp_path / "source", QWEN2)
    (source / INDEX).write_text('{"weight_map": {')
    with pytest.raises(ValueError, match=re.escape(f"{source / INDEX} is not JSON")):
        load(source)
    for found in ("{}", '{"weight_map": null}', '{"weight_map": []}'):
        (source / INDEX).write_text(found)
        with pytest.raises(ValueError, match=re.escape(f"{source / INDEX}: weight_map must name")):
            load(source)


def test_shards_without_their_index_ask_for_it(tmp_path):
    sharded(tmp_path / "model")
    (tmp_path / "model" / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"lacks {INDEX}")):
        load(tmp_path / "model")


def test_pickled_weights_are_not_read(tmp_path):
    write_checkpoint(tmp_path, QWEN2)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    message = r"lacks model\.safetensors; pytorch_model\.bin is a pickle, which is not read: .* safetensors"
    with pytest.raises(FileNotFoundError, match=message):
        load(tmp_path)


def test_an_unsupported_config_is_an_error_that_names_the_file(tmp_path):
    write_checkpoint(tmp_path, QWEN2 | {"model_type": "gemma"})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/config.json: model_type must be one of")):
        read_config(tmp_path)


@pytest.mark.parametrize("failing", [0, 1], ids=["first file", "second file"])
def test_a_failing_write_leaves_the_old_folder(failing, tmp_path, monkeypatch):
    """And the next save is not disturbed by what the failed one left."""
    source = write_checkpoint(tmp_path / "source", QWEN2)
    model = tmp_path / "model"
    cfg, params = load(source)
    save_model(model, params, cfg, source)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    doubled = jax.tree.map(lambda x: 2 * x, params)
    written = []

    def disk_full(tensors, path, **settings):
        if len(written) == failing:
            raise OSError("No space left on device")
        written.append(path)
        save_file(tensors, path, **settings)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OutputError, match=r"cannot write .*model: No space left"),
    ):
        patch.setattr("safetensors.numpy.save_file", disk_full)
        save_model(model, doubled, cfg, source, max_shard_size="30KB")
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    save_model(model, doubled, cfg, source)
    assert_same_tensors(saved(model)[0], {n: 2 * x for n, x in random_tensors(QWEN2).items()})
    assert {folder.name for folder in tmp_path.iterdir()} == {"source", "model"}
    assert (
        len({file.stat().st_mode for file in model.iterdir()}) == 1
    )  # safetensors' own is for the owner alone


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (path := tmp_path / "rows.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"rows\.jsonl is a file; name a folder"), whole_folder(path):
        pass
    assert path.read_text() == "mine" and [*tmp_path.iterdir()] == [path]


def test_a_folder_that_holds_more_than_a_model_keeps_it(case, tmp_path):
    """The last line of many scripts: `trainer.save_model(args.output_dir)`, where the checkpoints are."""
    source = write_checkpoint(tmp_path / "source", case)
    cfg, params = load(source)
    run = tmp_path / "run"
    (run / "checkpoints/10").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    (run.with_name("run.old")).mkdir()
    save_model(run, params, cfg, source, max_shard_size="30KB")
    shards = len(list(run.glob("model-*.safetensors")))
    assert shards > 1
    save_model(run, params, cfg, source)
    assert [path.name for path in run.glob("*.safetensors*")] == ["model.safetensors"]  # the shards are gone
    assert (run / "checkpoints/10").is_dir() and (run / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir() if "run" in path.name) == ["run", "run.old"]
    jax.tree.map(np.testing.assert_array_equal, load(run)[1], params)
