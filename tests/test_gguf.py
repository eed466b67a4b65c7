"""GGUF files: what the package gguf writes is read as the model that it was."""

import functools
import json
import sys

import helpers
import launch
import numpy as np
import parity
import pytest
from gguf import GGML_QUANT_SIZES, GGUFWriter, dequantize, quantize
from gguf import GGMLQuantizationType as Type

from grpo_jax import export
from grpo_jax.models import cache, gguf, hf
from grpo_jax.models.rope import Llama3, frequencies
from grpo_jax.models.scratch import CHAT_TEMPLATE
from grpo_jax.preflight.plan_inputs import model_sizes
from grpo_jax.rollout.conversation import load_conversation
from grpo_jax.run.options import GRPOConfig

SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-5}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {
    "llama": parity.CASES["llama3"] | SIZES | {"rope_scaling": None},
    "qwen2": parity.QWEN2 | SIZES | {"tie_word_embeddings": True},
    "qwen3": parity.QWEN3 | SIZES | {"head_dim": 128},  # which transformers' loader takes for granted
}
TO_GGUF = {hf_name: name for name, hf_name in gguf.NAMES.items()}
TYPES = {"embed_tokens": Type.F16, "q_proj": Type.Q8_0, "k_proj": Type.Q4_0, "v_proj": Type.Q4_1}
TYPES |= {"gate_proj": Type.BF16, "down_proj": Type.Q4_1}  # all others are F32


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


@functools.cache
def tokenizer_folder():
    folder = helpers.Path(helpers.tempfile.mkdtemp()) / "model"
    texts = [json.dumps(helpers.SCHEMAS), *helpers.QUESTIONS, "café 1234"] * 3
    return helpers.make_tiny_checkpoint(folder, texts, helpers.Sizes(vocab_size=400))


def permuted(w, heads):
    """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def named(name):
    """GGUF's name of an HF tensor."""
    *stem, end = name.removeprefix("model.layers.").split(".")
    if not name.startswith("model.layers."):
        return f"{TO_GGUF['.'.join(stem)]}.{end}"
    return f"blk.{stem[0]}.{TO_GGUF['.'.join(stem[1:])]}.{end}"


def write_gguf(path, config, tensors, types=TYPES, arch=None, extra=(), change=lambda w: None):
    """A file as llama.cpp's converter writes it; returns the tensors as its types round them."""
    kind, rounded = config["model_type"], {}
    w = GGUFWriter(path, arch or kind)
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(config["head_dim"])
    w.add_rope_dimension_count(config["head_dim"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config["rope_theta"])
    w.add_vocab_size(config["vocab_size"])
    add_tokenizer(w)
    change(w)
    for name, x in extra:
        w.add_tensor(name, x)
    for name, x in tensors.items():
        quant = types.get(name.split(".")[-2], Type.F32) if x.ndim > 1 else Type.F32
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        turned = kind == "llama" and heads is not None
        stored = quantize(permuted(x, config[heads]) if turned else x, quant)
        w.add_tensor(named(name), stored, raw_dtype=quant)
        rounded[name] = dequantize(quantize(x, quant), quant).astype(np.float32)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return rounded


def add_tokenizer(w):
    made = json.loads((tokenizer_folder() / "tokenizer.json").read_text())
    settings = json.loads((tokenizer_folder() / "tokenizer_config.json").read_text())
    added = {one["id"]: one for one in made["added_tokens"]}
    of = {i: token for token, i in made["model"]["vocab"].items()} | {
        i: a["content"] for i, a in added.items()
    }
    ids = range(max(of) + 1)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list([of.get(i, f"[PAD{i}]") for i in ids])
    kinds = {i: gguf.CONTROL if one["special"] else gguf.USER_DEFINED for i, one in added.items()}
    w.add_token_types([kinds.get(i, 1 if i in of else gguf.UNUSED) for i in ids])
    w.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    w.add_eos_token_id(next(i for i, token in of.items() if token == settings["eos_token"]))
    w.add_chat_template(settings["chat_template"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_is_the_model_that_it_was_made_of(kind, tmp_path):
    """Against the safetensors folder of the same, rounded tensors, bit for bit."""
    config = CONFIGS[kind]
    rounded = write_gguf(tmp_path / "m.gguf", config, parity.random_tensors(config))
    cfg, params = parity.load(gguf.gguf_folder(tmp_path / "m.gguf"))
    same, want = parity.load(parity.write_checkpoint(tmp_path / "hf", config, rounded))
    assert cfg == same
    equal = parity.jax.tree.map(lambda a, b: bool((a == b).all()), params, want)
    assert all(parity.jax.tree.leaves(equal)), equal


def test_tokenizer_template_and_stop_tokens_are_the_models(tmp_path):
    config = CONFIGS["llama"]
    write_gguf(tmp_path / "m.gguf", config, parity.random_tensors(config))
    ours, own = (
        load_conversation(gguf.gguf_folder(tmp_path / "m.gguf")),
        load_conversation(tokenizer_folder()),
    )
    asked = [{"role": "user", "content": "Café 1234,  it's <|im_end|> ünï\n\n x"}]
    assert ours.prompt_ids(asked, helpers.SCHEMAS) == own.prompt_ids(asked, helpers.SCHEMAS)
    assert ours.response_ids([("add", "Sum: 1")]) == own.response_ids([("add", "Sum: 1")])
    assert ours.stop_ids[0] == own.stop_ids[0]
    assert ours.control_ids == own.control_ids


def test_an_old_file_of_qwen_that_does_not_name_its_split_has_qwens(tmp_path):
    config = CONFIGS["qwen2"]
    old = {"change": lambda w: w.kv_data[0].pop("tokenizer.ggml.pre")}
    for name, more in (("new", {}), ("old", old)):
        write_gguf(tmp_path / f"{name}.gguf", config, parity.random_tensors(config), **more)
    new, old = (load_conversation(gguf.gguf_folder(tmp_path / f"{name}.gguf")) for name in ("new", "old"))
    asked = [{"role": "user", "content": "Café 1234,  it's ünï\n\n x"}]
    assert new.prompt_ids(asked, helpers.SCHEMAS) == old.prompt_ids(asked, helpers.SCHEMAS)


@pytest.mark.parametrize("quant", ["Q4_K", "Q6_K", "Q5_0", "Q8_0"])
def test_rows_of_a_quantised_tensor_are_read_alone(quant, tmp_path):
    rng, kind = np.random.default_rng(0), Type[quant]
    block, size = GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 60, (4, 512 // block * size), np.uint8)  # as a float16, small enough everywhere
    path = tmp_path / "x"
    stored.tofile(path)
    tensor = gguf.InGguf(path, quant, (4, 512), 0, stored.shape[1], None)
    want = dequantize(stored, kind)
    assert np.isfinite(want).all() and want.std() > 0
    np.testing.assert_array_equal(tensor[1:3, 5:9], want[1:3, 5:9])
    np.testing.assert_array_equal(tensor[:], want)


def test_llama3s_scaling_is_read_from_its_factors(tmp_path):
    """The file holds what each frequency is divided by, as llama.cpp's converter computes it."""
    config = CONFIGS["llama"] | {"rope_theta": 500000.0, "head_dim": 16}
    scaling = Llama3(32.0, 8192, 1.0, 4.0)
    factors = frequencies(500000.0, 16) / frequencies(500000.0, 16, scaling)
    tensors = parity.random_tensors(config)
    write_gguf(tmp_path / "m.gguf", config, tensors, extra=[("rope_freqs.weight", factors)])
    assert hf.read_config(gguf.gguf_folder(tmp_path / "m.gguf")).rope == scaling
    write_gguf(tmp_path / "n.gguf", config, tensors, extra=[("rope_freqs.weight", factors + 1)])
    with pytest.raises(ValueError, match=r"n\.gguf: rope_freqs\.weight holds factors other than"):
        gguf.gguf_folder(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"arch": "gemma2"}, "the architecture must be one of llama, qwen2, qwen3, got 'gemma2'"),
        ({"types": {"o_proj": Type.F64}}, "blk.0.attn_output.weight is of type F64; supported: F32, F16"),
        ({"keep": 0.6}, "inside the tensor blk."),
        ({"keep": 0.01}, "is not a whole GGUF file"),
        ({"keep": 0.0}, "is not a whole GGUF file"),
        ({"extra": [("blk.0.odd.weight", np.zeros(2, np.float32))]}, "blk.0.odd.weight is not part of this"),
        ({"change": lambda w: w.add_uint16("split.count", 2)}, "is one of 2 parts of a model; join them"),
        (
            {"change": lambda w: w.add_rope_scaling_factor(4.0)},
            "rope.scaling.type must be none or yarn, got 'linear'",
        ),
        (
            {"change": lambda w: w.add_float32("llama.rope.scale_linear", 4.0)},
            "must be none or yarn, got 'linear'",
        ),
        ({"change": lambda w: w.kv_data[0].pop("tokenizer.ggml.pre")}, "with pre None"),
        ({"change": lambda w: w.kv_data[0].pop("tokenizer.ggml.merges")}, "tokenizer.ggml.merges is missing"),
    ],
    ids=[
        "architecture",
        "type",
        "half",
        "header",
        "empty",
        "tensor",
        "split",
        "linear",
        "old linear",
        "pre",
        "merges",
    ],
)
def test_what_is_wrong_with_a_file_is_named(spoil, message, tmp_path):
    path, config = tmp_path / "m.gguf", CONFIGS["llama"]
    if "types" in spoil:
        config_tensors = parity.random_tensors(config)
        w = GGUFWriter(path, "llama")
        w.add_tensor("blk.0.attn_output.weight", config_tensors["model.norm.weight"].astype(np.float64))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    else:
        given = {key: value for key, value in spoil.items() if key != "keep"}
        write_gguf(path, config, parity.random_tensors(config), **given)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * spoil.get("keep", 1))])
    with pytest.raises(ValueError) as error:
        parity.load(gguf.gguf_folder(path))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_a_file_that_is_gone_or_another_one_is_named(tmp_path):
    path, config = tmp_path / "m.gguf", CONFIGS["qwen2"]
    write_gguf(path, config, parity.random_tensors(config))
    folder = gguf.gguf_folder(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"m\.gguf has changed since"):
        parity.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.gguf, which holds the weights of .* is missing"):
        parity.load(folder)


def test_without_the_package_the_install_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"m\.gguf needs the package gguf: pip install"):
        hf.fetch_model(str(tmp_path / "m.gguf"))


def test_a_plan_reads_the_files_sizes(tmp_path):
    config = CONFIGS["llama"]
    write_gguf(tmp_path / "m.gguf", config, parity.random_tensors(config))
    sizes, folder = model_sizes(GRPOConfig(model_name_or_path=str(tmp_path / "m.gguf")))
    assert (sizes.model_type, sizes.D, sizes.L) == ("llama", 64, 2)
    assert folder is not None and (folder / "tokenizer.json").exists()


@pytest.mark.slow
def test_a_file_trains_continues_and_is_exported_as_what_it_was(tmp_path):
    config = CONFIGS["llama"]
    write_gguf(tmp_path / "m.gguf", config, parity.random_tensors(config))
    options = {"model_name_or_path": tmp_path / "m.gguf", "chat_template": "hermes"}
    ran = launch.small_run(tmp_path / "run", **options, max_steps=2)
    assert ran.status == 0, ran.err
    assert ran.json("model/config.json")["architectures"] == ["LlamaForCausalLM"]
    assert (ran.folder / "model" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    flags = ("--checkpoint", ran.folder / "checkpoints" / "2", "--to", tmp_path / "exported")
    assert launch.call(export.main, flags, ran.folder).status == 0
    left = {path.name: path.read_bytes() for path in (ran.folder / "model").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()} == left
    again = launch.small_run(tmp_path / "run", **options, max_steps=3)
    assert again.status == 0 and "Continuing from the checkpoint of update 2" in again.out


# Against transformers


@pytest.mark.torch
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_transformers_own_loader_and_the_export_loads(kind, tmp_path):
    torch = pytest.importorskip("torch")
    import torch_reference
    from transformers import AutoModelForCausalLM

    config = CONFIGS[kind]
    write_gguf(tmp_path / "m.gguf", config, parity.random_tensors(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    folder = gguf.gguf_folder(tmp_path / "m.gguf")
    cfg, params = parity.load(folder)
    ours = parity.logits(params, parity.tokens(), cfg)[0]
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(torch_reference.logits(theirs, parity.tokens()), ours, rtol=0, atol=1e-4)
    params["norm"]["scale"] = params["norm"]["scale"] * 1.5
    hf.save_model(tmp_path / "model", params, cfg, folder)
    exported = torch_reference.published(tmp_path / "model")
    assert type(exported).__name__ == gguf.CLASSES[kind]
    assert not (tmp_path / "model" / gguf.TENSORS).exists()
    ours = parity.logits(params, parity.tokens(), cfg)[0]
    np.testing.assert_allclose(torch_reference.logits(exported, parity.tokens()), ours, rtol=0, atol=1e-4)
