"""Bad input stops a command before anything is compiled: what is wrong, where, and the fix."""

import json
import re
import shutil
import time

import huggingface_hub.constants
import launch
import pytest

from grpo_jax import evaluate, sft, train
from grpo_jax.scoring.rewards import RewardError

ROW = '{"prompt": "What is 15 plus 27?", "answer": "Sum: 42"}\n'
TOOL = 'def add(a: int, b: int) -> str:\n    """Add two numbers."""\n    return f"Sum: {a + b}"\n'
REWARD = "def score(completions, **kwargs):\n    return [0.0] * len(completions)\n"


def rejected(tmp_path, *flags, main=train.main, **changes) -> str:
    """The message of a command that must refuse its input before it compiles or trains."""
    ran = launch.call(main, [*launch.options(tmp_path / "run", **changes), *flags], tmp_path / "run")
    assert ran.status == 2, ran.out
    assert ran.compiles == 0
    assert ran.err.startswith("Error: ")
    assert "Traceback" not in ran.err
    return ran.err


def file(tmp_path, text, name="input.jsonl"):
    return launch.write(tmp_path / name, text)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(launch.small_model(), tmp_path / "model")


# Data


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (ROW + "{'prompt': 1}\n", 2, "not JSON"),
        (ROW + '"text"\n', 2, "a row must be a JSON object"),
        (ROW + '{"answer": "Sum: 42"}\n', 2, "has no column 'prompt'; it has 'answer'"),
        ('{"prompt": "What?"}\n', 1, "has no column 'answer'; it has 'prompt'"),
        (ROW + "\n" + ROW, 2, "empty line between rows; delete it"),
        (ROW * 2 + '{"prompt": " ", "answer": "x"}\n', 3, "'prompt' is empty"),
        (ROW + '{"prompt": "What?", "answer": null}\n', 2, "'answer' must be text, as the tool returns it"),
    ],
)
@pytest.mark.parametrize("main", [train.main, sft.main])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, text, line, message, main):
    path = file(tmp_path, text)
    assert f"{path}:{line}: {message}" in rejected(tmp_path, main=main, dataset_id_or_path=path)


def test_a_bad_row_of_the_evaluation_is_named_by_file_and_line(tmp_path):
    path = file(tmp_path, ROW + "[]\n")
    assert f"{path}:2: a row must be" in rejected(tmp_path, main=evaluate.main, eval_dataset_id_or_path=path)


def test_an_empty_file_says_what_a_row_looks_like(tmp_path):
    path = file(tmp_path, "")
    message = rejected(tmp_path, dataset_id_or_path=path)
    assert f'{path} contains no rows; a row is an object like {{"prompt"' in message


def test_a_missing_data_file_names_the_nearest(tmp_path):
    near = file(tmp_path, ROW, "trian.jsonl")
    path = tmp_path / "train.jsonl"
    assert f"data set {path} does not exist; nearest: {near}" in rejected(tmp_path, dataset_id_or_path=path)


@pytest.mark.parametrize("part", ["", "[:8]"])
def test_a_missing_test_file_is_found_before_training(tmp_path, part):
    path = tmp_path / "test.jsonl"
    message = rejected(tmp_path, eval_dataset_id_or_path=f"{path}{part}")
    assert f"{path} does not exist" in message
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_bad_test_row_is_found_before_the_cold_start(tmp_path):
    path = launch.write_rows(tmp_path / "test.jsonl", [*launch.rows(60, 3), {"prompt": "What?"}])
    for rows, message in (
        ([{"prompt": "What?"}], "has no column 'answer'"),
        (
            [{"prompt": "x", "answer": "y", "tool_call": {"name": "sum", "arguments": {}}}],
            "unknown tool 'sum'",
        ),
    ):
        path = launch.write_rows(tmp_path / "test.jsonl", [*launch.rows(60, 3), *rows])
        said = rejected(tmp_path, eval_dataset_id_or_path=path, cold_start=True)
        assert f"{path}:4: " in said and message in said
    assert not (tmp_path / "run/cold_start").exists()


@pytest.mark.parametrize("cold_start", [{"main": train.main, "cold_start": True}, {"main": sft.main}])
def test_validation_rows_without_the_figure_that_stops_the_cold_start(tmp_path, cold_start):
    """Rows whose answer is an error are counted separately, so there is no exact_answer_match."""
    errors = [row | {"answer": "Error: no"} for row in launch.rows(60, 4)]
    path = launch.write_rows(tmp_path / "train.jsonl", [*launch.rows(10, 24), *errors])
    message = rejected(tmp_path, dataset_id_or_path=path, **cold_start)
    assert f"{path}:25: the answers of all 4 validation rows" in message
    assert "no exact_answer_match to stop the cold start by (sft_stop_match 0.95)" in message


@pytest.mark.parametrize("main", [train.main, sft.main, evaluate.main])
def test_prompts_beyond_the_models_positions(tmp_path, model, main):
    """Longest prompt + budget, in every command; YaRN multiplies the limit."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    message = rejected(tmp_path, main=main, model_name_or_path=model)
    found = re.search(
        r"train.jsonl:\d+: the longest prompt has (\d+) tokens, which with .* 79 makes (\d+);", message
    )
    assert int(found[1]) + 79 == int(found[2]) > 128
    assert "the model was made for 128 positions" in message
    ran = launch.call(
        train.main, [*launch.options(tmp_path / "run", model_name_or_path=model), "--check"], tmp_path
    )
    assert ran.status == 2 and "the longest prompt has" in ran.err
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}
    (model / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 128, "rope_scaling": yarn})
    )
    ran = launch.call(
        train.main, [*launch.options(tmp_path / "run", model_name_or_path=model), "--check"], tmp_path
    )
    assert "the longest prompt has" not in ran.err


def test_no_data_set_says_which_option_to_set(tmp_path):
    message = rejected(tmp_path, dataset_id_or_path=None)
    assert "dataset_id_or_path must be set: --dataset_id_or_path VALUE" in message


def test_a_prompt_over_max_prompt_length_is_named_by_line(tmp_path):
    path = file(tmp_path, ROW * 2 + ROW.replace("What", "Please tell me, what" * 9))
    message = rejected(tmp_path, dataset_id_or_path=path, max_prompt_length=320)
    assert f"{path}:3: the prompt has" in message
    assert (
        "more than max_prompt_length 320; raise that, shorten the prompt, or set overlong_prompts to drop"
        in message
    )


def test_dropping_every_prompt_is_an_error(tmp_path):
    message = rejected(tmp_path, max_prompt_length=20, overlong_prompts="drop")
    assert "every prompt is longer than max_prompt_length 20; raise it" in message


def test_fewer_rows_than_a_batch_has_prompts(tmp_path):
    path = file(tmp_path, ROW)
    message = rejected(tmp_path, dataset_id_or_path=path)
    assert "one update needs 2 prompts (2 × 4 completions), but the data has 1 rows" in message


def test_a_cold_start_without_gold_calls_is_named_by_line(tmp_path):
    """Wherever the row is: not in the middle of the cold start."""
    gold = ROW.replace("}", ', "tool_call": {"name": "add", "arguments": {"a": 15, "b": 27}}}')
    path = file(tmp_path, gold * 6 + ROW * 25 + gold * 4)
    message = rejected(tmp_path, dataset_id_or_path=path, cold_start=True, sft_batch_size=8)
    assert (
        f"{path}:7: fine-tuning needs a gold call in column tool_call or ground_truth, got none; 6 of "
        in message
    )
    assert "rows have one, fewer than sft_batch_size, 8" in message
    path = file(tmp_path, gold * 30 + gold.replace('"add"', '"sum"') + gold * 4)
    message = rejected(tmp_path, dataset_id_or_path=path, cold_start=True)
    assert f"{path}:31: column 'tool_call': unknown tool 'sum'; the tools are add, multiply" in message


@pytest.mark.parametrize("cold_start", [{"main": train.main, "cold_start": True}, {"main": sft.main}])
def test_a_gold_conversation_over_the_budget_is_named_by_line(tmp_path, cold_start):
    """The first in the file, not the first that is drawn."""
    gold = ROW.replace("}", ', "tool_call": [{"name": "add", "arguments": {"a": 15, "b": 27}}]}')
    twice = re.sub(r"\[(.*)\]", r"[\1, \1]", gold)
    path = file(tmp_path, gold * 20 + twice + gold * 2 + twice * 2 + gold * 8)
    message = rejected(tmp_path, dataset_id_or_path=path, **cold_start)
    assert re.search(
        rf"{path}:21: the gold conversation has \d+ tokens .* max_grpo_completion_length 79; raise", message
    )


@pytest.mark.parametrize("main", [train.main, evaluate.main])
def test_a_prompt_that_the_template_does_not_take_is_named_by_line(tmp_path, model, main):
    settings = model / "tokenizer_config.json"
    told = json.loads(settings.read_text())
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No system message.') }}{% endif %}"
    settings.write_text(json.dumps(told | {"chat_template": strict + told["chat_template"]}))
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 plus 2?"}]
    path = file(tmp_path, ROW * 20 + json.dumps({"prompt": prompt, "answer": "Sum: 3"}) + "\n" + ROW)
    message = rejected(tmp_path, main=main, model_name_or_path=model, dataset_id_or_path=path)
    assert (
        f"{path}:21: the model's chat template does not take this conversation: No system message." in message
    )
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ('["add", "multipl"]', "column 'tools': unknown tool 'multipl'; nearest: multiply"),
        ("[]", "column 'tools' must be a list of tool names"),
        ('["multiply"]', "column 'tool_call': the row does not show the tool 'add', only multiply"),
    ],
)
def test_bad_tools_of_a_row_are_named_by_line(tmp_path, tools, message):
    gold = '"tool_call": {"name": "add", "arguments": {"a": 15, "b": 27}}'
    path = file(tmp_path, ROW * 2 + ROW.replace("}", f', {gold}, "tools": {tools}}}'))
    assert f"{path}:3: {message}" in rejected(tmp_path, dataset_id_or_path=path)


def test_a_mapping_of_columns_that_a_row_lacks_is_named_by_line(tmp_path):
    path = file(tmp_path, ROW.replace("prompt", "question") + ROW)
    for model in (launch.small_model(), "scratch"):
        message = rejected(
            tmp_path,
            model_name_or_path=model,
            dataset_id_or_path=path,
            dataset_columns={"prompt": "question"},
        )
        assert f"{path}:2: has no column 'question', which dataset_columns names" in message


# Tools and rewards


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOOL, "No TOOL_FUNCTIONS found in {path}; end it with TOOL_FUNCTIONS = [your_function, …]"),
        (
            TOOL + "TOOL_FUNCTIONS = []\n",
            "TOOL_FUNCTIONS in {path} must be a list with at least one function",
        ),
        (
            TOOL.replace("b: int", "b") + "TOOL_FUNCTIONS = [add]\n",
            "{path}:1, add: argument 'b' has no type hint; write b: int",
        ),
        (
            TOOL.replace('"""Add two numbers."""', "") + "TOOL_FUNCTIONS = [add]\n",
            "{path}:1, add: a tool needs a docstring, which is what the model reads; add one",
        ),
        ("import nothing_of_that_name\n", "importing {path} failed: ModuleNotFoundError"),
    ],
)
def test_bad_tools_name_file_function_and_argument(tmp_path, text, message):
    path = file(tmp_path, text, "my_tools.py")
    assert message.format(path=path) in rejected(tmp_path, tools_script=path)


def test_missing_tools_are_named(tmp_path):
    path = tmp_path / "none.py"
    message = rejected(tmp_path, tools_script=path)
    assert f"tools_script must be a Python file, and {path} does not exist" in message
    message = rejected(tmp_path, tool_functions_module="tools_funcs.maths")
    assert "tool_functions_module 'tools_funcs.maths' is not importable" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (REWARD, "No reward_func found in {path}; end it with reward_func = your_function"),
        (REWARD + "reward_func = 1.0\n", "reward_func must be callable, got 1.0 in {path}"),
        ("def reward_func(:\n", "importing {path} failed: SyntaxError"),
    ],
)
def test_bad_rewards_name_the_file(tmp_path, text, message):
    path = file(tmp_path, text, "my_reward.py")
    assert message.format(path=path) in rejected(tmp_path, reward_fn=path)


def test_missing_rewards_are_named(tmp_path):
    path = tmp_path / "none.py"
    assert f"reward_fn must be a Python file, and {path} does not exist" in rejected(tmp_path, reward_fn=path)
    message = rejected(tmp_path, reward_fn=None, reward_function_name="acuracy")
    assert "Unknown reward function: acuracy. Available: accuracy, grounded" in message


# Options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--num_generation", "4"],
            "--num_generation: unknown option 'num_generation'; nearest: num_generations",
        ),
        (["--max_steps", "many"], "--max_steps: max_steps must be a whole number, got 'many'"),
        (["--beta", "-1"], "--beta: beta must be >= 0, got -1"),
        (
            ["--loss_type", "ppo"],
            "--loss_type: loss_type must be one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo, got 'ppo'",
        ),
        (["--per_device_train_batch_size", "6"], "must divide by num_generations 4, got 6"),
        (["--resume_from_checkpoint", "3"], "resume_from_checkpoint must be a step's folder"),
    ],
)
def test_bad_flags_are_named_with_the_fix(tmp_path, flags, message):
    assert message in rejected(tmp_path, *flags)


@pytest.mark.parametrize(
    ("changes", "line", "message"),
    [
        (
            {"learning_rat": 1e-4},
            1,
            "unknown option 'learning_rat'; nearest: learning_rate (its value: 0.0001)",
        ),
        ({"max_steps": "many"}, 1, "max_steps must be a whole number, got 'many'"),
    ],
)
def test_bad_yaml_is_named_by_file_and_line(tmp_path, changes, line, message):
    assert f"{tmp_path / 'run.yaml'}:{line}: {message}" in rejected(tmp_path, **changes)


def test_nearest_valid_batches_are_named(tmp_path):
    message = rejected(tmp_path, per_device_train_batch_size=6)
    assert "nearest valid: gradient_accumulation_steps 2, or num_generations 2 or 3" in message


def test_a_fresh_start_over_checkpoints_is_refused(tmp_path):
    folder = shutil.copytree(launch.whole().folder, tmp_path / "run")
    (folder / "summary.json").unlink()  # as if it had been interrupted
    message = rejected(tmp_path, resume_from_checkpoint="none")
    assert "holds checkpoints; start over with --overwrite_output_dir" in message


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_would_write_over_what_it_starts_from_is_refused(tmp_path, overwrite):
    folder = shutil.copytree(launch.whole().folder, tmp_path / "run")
    message = rejected(tmp_path, model_name_or_path=folder / "model", overwrite_output_dir=overwrite)
    assert (
        f"model_name_or_path {folder / 'model'} is in output_dir {folder}, whose run would overwrite it"
        in message
    )
    if overwrite:
        message = rejected(
            tmp_path, resume_from_checkpoint=folder / "checkpoints/4", overwrite_output_dir=True
        )
        assert "resume_from_checkpoint" in message and "choose another output_dir" in message
    assert (folder / "model/model.safetensors").exists() and (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"model_name_or_path": "no/such/folder"}, "no/such/folder"),
        ({"micro_batches": 7}, "micro_batches 7 cannot split"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5000}},
            "num_decay_steps 5000",
        ),
    ],
)
def test_wrong_input_does_not_cost_the_run_that_it_would_replace(tmp_path, changes, text):
    folder = shutil.copytree(launch.whole().folder, tmp_path / "run")
    assert text in rejected(tmp_path, overwrite_output_dir=True, **changes)
    assert (folder / "summary.json").exists() and (folder / "checkpoints").exists()


# Models


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_without_a_needed_file_names_it(tmp_path, model, name):
    (model / name).unlink()
    message = rejected(tmp_path, model_name_or_path=model)
    assert str(model) in message
    assert name in message
    assert "copy it from the model's repository" in message


def test_a_model_folder_without_a_chat_template_says_what_to_use(tmp_path, model):
    (model / "tokenizer_config.json").unlink()
    message = rejected(tmp_path, model_name_or_path=model)
    assert f"tokenizer '{model}' needs a chat template; use an Instruct model's, or give one with" in message


def test_damaged_model_files_are_named(tmp_path, model):
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    message = rejected(tmp_path, model_name_or_path=model)
    assert f"{model / 'model.safetensors'} is not a whole safetensors file" in message
    (model / "config.json").write_text('{"model_type": "qwen3",')
    message = rejected(tmp_path, model_name_or_path=model)
    assert f"{model / 'config.json'} is not JSON" in message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("generation_config.json", "{nope", "is not JSON"),
        ("generation_config.json", "[1]", "must hold a JSON object"),
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            "eos_token_id must be a token id or a list of them",
        ),
        ("config.json", "[]", "must hold a JSON object"),
        ("config.json", '{"model_type": "qwen3", "hidden_size": "64"}', "hidden_size must be a whole number"),
        (
            "config.json",
            '{"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": null}',
            "num_attention_heads must be a whole number",
        ),
        ("tokenizer.json", "{nope", "cannot be loaded"),
        ("tokenizer_config.json", "{nope", "cannot be loaded"),
        (
            "tokenizer_config.json",
            '{"chat_template": "<tool_call> {% for %}"}',
            "cannot be rendered (TemplateSyntaxError",
        ),
    ],
)
def test_broken_files_of_a_model_are_named(tmp_path, model, name, text, message):
    (model / name).write_text(text)
    said = rejected(tmp_path, model_name_or_path=model)
    assert message in said
    assert str(model) in said


def test_the_base_of_an_adapter_folder_that_is_not_there_is_named(tmp_path):
    folder = tmp_path / "adapter"
    launch.write(
        folder / "adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "some/base"}'
    )
    message = rejected(tmp_path, model_name_or_path=folder)
    assert "model some/base is not a local folder, is not in the hub cache" in message


def test_a_weight_file_is_no_model_folder(tmp_path, model):
    path = model / "model.safetensors"
    message = rejected(tmp_path, model_name_or_path=path)
    assert f"model {path} is a file; name the folder that holds it" in message


# output_dir


@pytest.mark.parametrize("main", [train.main, sft.main, evaluate.main])
@pytest.mark.parametrize("below", ["", "/run"])
def test_an_output_dir_that_is_a_file(tmp_path, main, below):
    path = launch.write(tmp_path / "file", "mine")
    message = rejected(tmp_path, "--output_dir", f"{path}{below}", main=main)
    assert f"output_dir {path}{below}: {path} is a file; choose a folder for the results" in message
    assert path.read_text() == "mine"


@pytest.mark.parametrize("main", [train.main, sft.main, evaluate.main])
def test_an_output_dir_that_cannot_be_written(tmp_path, main):
    """A folder of the kernel, since the tests may run as root, whom no permission keeps out."""
    message = rejected(tmp_path, "--output_dir", "/proc/sys/run", main=main)
    assert "output_dir /proc/sys/run cannot be written: " in message
    assert message.count("\n") == 1


def test_another_architecture_is_refused(tmp_path, model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"qwen3"', '"gemma"'))
    message = rejected(tmp_path, model_name_or_path=model)
    assert f"{model / 'config.json'}" in message
    assert "gemma" in message


def test_a_missing_model_folder_names_the_alternatives(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = rejected(tmp_path, model_name_or_path=tmp_path / "modle")
    assert f"model folder {tmp_path / 'modle'} does not exist" in message
    assert "'scratch'" in message
    assert message.endswith("folders here that hold a model: model\n")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/no such name"])
def test_a_hub_model_that_cannot_be_reached_names_the_alternatives(tmp_path, model, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    message = rejected(tmp_path, model_name_or_path=name)
    assert (
        f"model {name} is not a local folder, is not in the hub cache, and could not be downloaded" in message
    )
    assert "Give the path of a local HF folder, or to train, 'scratch'" in message
    assert message.endswith("folders here that hold a model: model\n")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "tokenisers/mine/qwen"])
def test_a_tokenizer_that_cannot_be_reached_is_said_at_once(tmp_path, monkeypatch, name):
    """Left to transformers, six attempts at each of its files take 55 seconds."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    began = time.perf_counter()
    message = rejected(tmp_path, tokenizer_name_or_path=name)
    assert time.perf_counter() - began < 20  # without a loaded machine: 1
    assert f"tokenizer {name} is not a local folder" in message or f"tokenizer folder {name}" in message


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"vocab_size": 512', '"vocab_size": 300'))
    message = rejected(tmp_path, model_name_or_path=model)
    assert "but the model's embedding only 300 rows; use the model's own tokenizer" in message


# A reward function that fails while training


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[1 / (a != {second!r}) for a in kwargs['answer']]", r"raised on row 4 \(answer '{second}'\): Zero"),
        ("[0.0] * 7", r"must return one value for each of the 8 completions, got 7 values"),
        ("[0.0, '1.0'] * 4", r"must return finite numbers.*row 1 got '1\.0'"),
        ("[0.0, 0.5, float('nan'), 1.0] * 2", r"must return finite numbers.*row 2 got nan"),
        ("'good'", r"must return a list .* got str: 'good'"),
    ],
)
def test_a_bad_reward_stops_the_run_with_its_name_and_row_and_nothing_saved_is_lost(tmp_path, body, message):
    """The reward goes wrong after update 3 of a run that has saved three checkpoints."""
    folder = shutil.copytree(launch.whole().folder, tmp_path / "run")
    for name in ("model", "checkpoints/4"):
        shutil.rmtree(folder / name)
    (folder / "summary.json").unlink()
    saved = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:3]
    second = launch.whole().jsonl("rollouts/step_000004.jsonl")[4]["answer"]  # of the second prompt
    body = body.replace("{second!r}", repr(second))
    reward = file(tmp_path, f"def reward_func(completions, **kwargs):\n    return {body}\n", "broken.py")
    message = rf"reward function 'broken' \({reward}\) {message.replace('{second}', second)}"
    with pytest.raises(RewardError, match=message):
        launch.small_run(folder, "--allow_config_change", reward_fn=reward)
    assert {
        path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()
    } == saved
    assert (folder / "metrics.jsonl").read_text().splitlines() == lines
    assert not (folder / "model").exists()
