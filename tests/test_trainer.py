"""The Python face: what a command does, a script does too, and bad input is refused before anything is written."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from grpo_jax import GRPOConfig, GRPOTrainer
from grpo_jax.models import cache
from grpo_jax.rollout.conversation import load_conversation
from grpo_jax.tools.load import load_tools

ROOT = Path(__file__).parents[1]


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return f"Sum: {a + b}"


def multiply(a: int, b: int) -> str:
    """Multiply two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return f"Product: {a * b}"


def spread(completions, completion_ids, **kwargs):
    return [sum(ids) % 11 / 10 for ids in completion_ids]


def small_config(folder: Path, **changes) -> GRPOConfig:
    """The options of the small run without what GRPOTrainer takes as arguments."""
    given = json.loads(Path(launch.options(folder)[1]).read_text())
    for name in ("model_name_or_path", "dataset_id_or_path", "tool_functions_module", "reward_fn"):
        del given[name]
    return GRPOConfig(**given | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The small run from Python: the command's tools and reward as functions, its rows as dicts."""
    folder = tmp_path_factory.mktemp("python") / "run"
    tools = list(load_tools(module="tools_funcs.math_tools").functions.values())
    with launch._jax_settings_kept():
        trainer = GRPOTrainer(
            model=str(launch.small_model()),
            tools=tools,
            reward_funcs=spread,
            train_dataset=launch.rows(10, 24),
            eval_dataset=launch.rows(60, 6),
            args=small_config(folder),
        )
        return trainer, trainer.train()


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without times and the reward's name."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "step_time" and "rewards/" not in k} for row in rows]


def test_a_script_does_what_the_command_does(trained):
    trainer, result = trained
    command = launch.whole()
    assert (result.global_step, result.finished) == (launch.UPDATES, True)
    assert lines(trainer.output_dir) == lines(command.folder)
    model = trainer.output_dir / "model" / "model.safetensors"
    assert model.read_bytes() == command.weights()


def test_train_returns_the_figures_of_the_summary(trained):
    trainer, result = trained
    summary = json.loads((trainer.output_dir / "summary.json").read_text())
    assert result.metrics["after"]["n"] == summary["after"]["n"] == 6
    assert result.metrics["updates"] == launch.UPDATES


def test_a_finished_run_says_so_and_keeps_its_files(trained, capsys):
    trainer, _ = trained
    before = (trainer.output_dir / "metrics.jsonl").read_bytes()
    result = trainer.train()
    assert (result.global_step, result.finished) == (launch.UPDATES, True)
    assert "is finished after 4 updates" in capsys.readouterr().out
    assert (trainer.output_dir / "metrics.jsonl").read_bytes() == before


def test_evaluate_gives_the_figures_of_the_trained_model(trained):
    trainer, result = trained
    figures = trainer.evaluate()
    for name in ("response_validity", "exact_answer_match", "tool_call_schema_match"):
        assert figures[name] == result.metrics["after"][name]
        assert figures["intervals"][name][0] <= figures[name] <= figures["intervals"][name][1]


def test_generate_gives_a_whole_conversation_as_messages(trained):
    trainer, _ = trained
    asked = [{"role": "user", "content": "Add 12 and 17."}]
    messages = trainer.generate("Add 12 and 17.")
    assert messages[:1] == asked and messages[1]["role"] == "assistant"
    assert trainer.generate(asked) == messages


def test_a_conversation_that_is_too_long_for_the_model_is_refused(trained):
    trainer, _ = trained
    with pytest.raises(
        ValueError, match=r"prompt: the longest prompt has \d+ tokens, .* the model was made for"
    ):
        trainer.generate("What? " * 20_000)


def test_save_model_writes_a_folder_that_evaluates_alike(trained, tmp_path):
    trainer, _ = trained
    trainer.save_model(tmp_path / "mine")
    exported = (tmp_path / "mine" / "model.safetensors").read_bytes()
    assert exported == (trainer.output_dir / "model" / "model.safetensors").read_bytes()


class Tool:
    """No function."""


BAD = {
    "no tools": ({"tools": None}, ValueError, "tools must be a list with at least one function"),
    "an empty list": ({"tools": []}, ValueError, "at least one function"),
    "a lambda": ({"tools": [lambda a: a]}, ValueError, "defined with `def`"),
    "a class": ({"tools": [Tool]}, ValueError, "defined with `def`"),
    "two of one name": ({"tools": [add, add]}, ValueError, "contains the name 'add' twice"),
    "no callable": ({"reward_funcs": 3.0}, TypeError, "reward_func must be callable|not iterable"),
    "one of several": ({"reward_funcs": ["accuracy", 3.0]}, TypeError, "reward_func must be callable"),
    "an unknown reward": ({"reward_funcs": "acuracy"}, ValueError, "Unknown reward function: acuracy"),
    "no prompt": ({"train_dataset": [{"answer": "x"}]}, ValueError, "has no column 'prompt'"),
    "no rows": ({"train_dataset": []}, ValueError, "contains no rows"),
    "a column without a name": (
        {"train_dataset": [{"prompt": "x", "answer": "y", 1: 2}]},
        ValueError,
        "row 1.*: the name of a column must be text, as rewards get columns by name, got 1",
    ),
    "options of TRL": (
        {"args": {"max_steps": 1}},
        TypeError,
        "args must be a GRPOConfig of grpo_jax, got dict",
    ),
    "a keyword of nobody": ({"tols": []}, TypeError, "GRPOTrainer has no argument 'tols'; nearest: tools"),
    "an optimizer": (
        {"optimizers": ("adam", None)},
        ValueError,
        "optimizers is not supported: optim, learning_rate",
    ),
    "DoRA": (
        {"peft_config": SimpleNamespace(use_dora=True, lora_alpha=8)},
        ValueError,
        "peft_config: use_dora True is not supported; leave it out",
    ),
    "no LoRA": ({"peft_config": SimpleNamespace()}, ValueError, "must be a LoraConfig, got SimpleNamespace"),
    "a missing file": ({"train_dataset": "no_such.jsonl"}, FileNotFoundError, "no_such.jsonl does not exist"),
}


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_bad_input_is_refused_with_the_commands_sentences_and_leaves_nothing(tmp_path, changes):
    changed, kind, sentence = BAD[changes]
    given = {"tools": [add, multiply], "reward_funcs": spread, "train_dataset": launch.rows(10, 24)}
    folder = tmp_path / "run"
    config = GRPOConfig(output_dir=str(folder))
    with pytest.raises(kind, match=sentence):
        GRPOTrainer(model="scratch", **{"args": config} | given | changed)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("rewards", "options", "problem"),
    [
        ([spread, "accuracy"], {"reward_weights": [1.0, 0.5]}, None),
        ([spread, "accuracy"], {"multi_objective_aggregation": "normalize_then_sum"}, None),
        (spread, {"reward_weights": [1.0, 0.5]}, r"1 functions \(spread\), got \[1.0, 0.5\]"),
        (spread, {"multi_objective_aggregation": "normalize_then_sum"}, "reward functions, got spread"),
    ],
)
def test_options_of_several_rewards_are_checked_with_those_that_are_given(
    tmp_path, rewards, options, problem
):
    folder = tmp_path / "run"
    given = {"tools": [add, multiply], "reward_funcs": rewards, "train_dataset": launch.rows(10, 24)}
    given |= {"model": str(launch.small_model()), "args": small_config(folder, **options)}
    if problem is None:
        assert len(GRPOTrainer(**given).job.rewards) == 2
    else:
        with pytest.raises(ValueError, match=problem):
            GRPOTrainer(**given)
        assert not folder.exists()


def test_an_unknown_keyword_names_the_nearest_and_an_unsupported_one_what_takes_its_place(caplog):
    with pytest.raises(TypeError, match="learning_rate"):
        GRPOConfig(lerning_rate=1e-5)
    with pytest.raises(ValueError, match="load_in_4bit"):
        GRPOConfig(load_in_4bit=True)
    GRPOConfig(vllm_mode="server")
    assert "the sampler is built in" in caplog.text


def test_a_function_that_cannot_be_copied_into_workers_names_itself_and_the_way_out(tmp_path):
    handle = (tmp_path / "open").open("w")

    def note(text: str) -> str:
        """Write a note."""
        handle.write(text)
        return "done"

    config = GRPOConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"(?s)note.*inline"):
        GRPOTrainer(
            model=str(launch.small_model()),
            tools=[note],
            reward_funcs=spread,
            train_dataset=launch.rows(10, 24),
            args=config,
        )
    handle.close()


# The examples


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["own_tools", "two_calls", "final_answer"])
def test_examples_are_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 60


def test_the_rewards_of_the_examples_by_hand():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "add", "content": "Sum: 3"}
    says = {"role": "assistant", "content": "The sum is 3."}
    silent = [{"role": "assistant", "content": "3"}]
    assert example("own_tools").exact([silent, [asked, result, says]], ["Sum: 3", "Sum: 3"]) == [0.0, 1.0]
    assert example("own_tools").exact([[asked, result]], ["Sum: 4"]) == [0.3]
    gold = [[{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "add", "arguments": {"a": 3, "b": 4}}]]
    assert example("two_calls").steps([[asked, result]], ["Sum: 7"], gold) == [0.25]
    scores = example("final_answer").states_the_result([silent, [asked, result, says], [asked, result]])
    assert scores == [None, 1.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_tools", "two_calls", "final_answer"])
def test_examples_run(name, tmp_path):
    """From a new model to a conversation, with few updates."""
    few = {
        "max_steps": 1,
        "sft_max_steps": 1,
        "sft_eval_steps": 1,
        "sft_validation_size": 50,
        "eval_batch_size": 50,
    }
    trainer = example(name).main(output_dir=str(tmp_path / "run"), per_device_train_batch_size=16, **few)
    assert {m["role"] for m in trainer.generate("What is 15 plus 27?")} >= {"user", "assistant"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not math.isnan(summary["after"]["exact_answer_match"])
    assert (tmp_path / "run" / "model").is_dir()


@dataclasses.dataclass
class LoraConfig:
    """The fields of PEFT's that matter here; tests/test_trl_script.py has its own."""

    r: int = 4
    lora_alpha: int = 8
    lora_dropout: float = 0.1
    target_modules: object = None
    use_rslora: bool = True
    bias: str = "none"
    rank_pattern: dict = dataclasses.field(default_factory=dict)


def small_trainer(folder, **more):
    """A trainer of the small model with other keywords of TRL's."""
    return GRPOTrainer(
        model=str(launch.small_model()),
        tools=[add, multiply],
        reward_funcs=spread,
        train_dataset=launch.rows(10, 24),
        args=small_config(folder),
        **more,
    )


@pytest.mark.parametrize("given", ["folder", "object"])
def test_the_tokenizer_that_trains_is_exported_with_the_model(tmp_path, monkeypatch, given):
    """Another folder's, or an object that a script has given another template."""
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(launch.small_model()))
    tokenizer.chat_template += "{# mine #}"
    tokenizer.save_pretrained(tmp_path / "other")
    trainer = small_trainer(
        tmp_path / "run",
        processing_class=tokenizer if given == "object" else str(tmp_path / "other"),
    )
    trainer.save_model(tmp_path / "model")
    written = load_conversation(tmp_path / "model").tokenizer
    assert (
        trainer.job.conversation.tokenizer.chat_template == written.chat_template == tokenizer.chat_template
    )
    weights = [
        load_file(folder / "model.safetensors") for folder in (launch.small_model(), tmp_path / "model")
    ]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.parametrize(
    ("modules", "expected"),
    [(None, None), ({"v_proj", "q_proj"}, ["q_proj", "v_proj"]), ("all-linear", ["all-linear"])],
)
def test_trls_other_keywords_become_options(tmp_path, modules, expected, caplog):
    tokenizer = SimpleNamespace(name_or_path=str(launch.small_model()))
    trainer = small_trainer(
        tmp_path / "run",
        peft_config=LoraConfig(target_modules=modules),
        processing_class=tokenizer,
        callbacks=["one"],
        optimizers=(None, None),
        quantization_config=None,
    )
    config = trainer.job.config
    assert (config.use_peft, config.lora_r, config.lora_alpha, config.lora_dropout) == (True, 4, 8, 0.1)
    assert (config.use_rslora, config.lora_target_modules) == (True, expected)
    assert config.tokenizer_name_or_path == tokenizer.name_or_path
    assert "callbacks has no effect here: the console, metrics.jsonl" in caplog.text
