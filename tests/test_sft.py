"""The cold start: what is learned of a gold row, the rule that ends it, and the command by itself."""

import contextlib
import dataclasses
import io
import json
import re
import time

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax import sft, train
from grpo_jax.run import cold_start
from grpo_jax.run.checkpoint import Checkpoints
from grpo_jax.run.config import parse_config
from grpo_jax.run.console import Console
from grpo_jax.run.fields import OPTIONS
from grpo_jax.run.job import Job, load_data, open_job, read_inputs
from grpo_jax.run.log import PhaseTimer
from grpo_jax.run.stopping import Stopped
from grpo_jax.scoring.rewards import RewardOutcome
from grpo_jax.tools import tools_of
from grpo_jax.types import Example, ToolCall
from grpo_jax.update.update import LossInputs, Totals, sft_objective, turns_objective


@contextlib.contextmanager
def opened(folder, **changes):
    """The job of a small run, and the training rows."""
    argv = launch.options(folder, compilation_cache_dir="none", **changes)
    config = parse_config(argv, prog="test").config
    inputs = read_inputs(config, config.dataset_id_or_path)
    job = open_job(config, Console(io.StringIO()), PhaseTimer(), inputs)
    with job.runner:
        yield job, load_data(job, inputs.train)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "run"
    with opened(folder, max_grpo_completion_length=120) as (job, _):
        yield job


def row(*calls, answer="Sum: 3") -> Example:
    gold = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return Example([{"role": "user", "content": "Add."}], answer, {"tool_call": gold}, "rows.jsonl:7")


def gold(job, example):
    return cold_start.gold_trajectories(job, [job.prompt(example)])[0]


def spans(job, trajectory) -> list[tuple[bool, str]]:
    """Neighbouring tokens of equal mask as (learned, text)."""
    out: list[tuple[bool, list[int]]] = []
    for token, learned in zip(trajectory.completion_ids, trajectory.sampled_mask, strict=True):
        if not out or out[-1][0] != learned:
            out.append((learned, []))
        out[-1][1].append(token)
    return [(learned, job.conversation.tokenizer.decode(ids)) for learned, ids in out]


# What is learned


def test_only_what_the_assistant_writes_is_learned(job):
    """End-of-turn tokens included; the tool's response and the next generation prompt are given."""
    assert spans(job, gold(job, row(("add", {"a": 1, "b": 2})))) == [
        (True, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'),
        (
            False,
            "\n<|im_start|>user\n<tool_response>\nSum: 3\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "Sum: 3<|im_end|>"),
    ]


def test_each_call_is_a_turn_and_the_last_result_is_the_answer(job):
    two = gold(job, row(("add", {"a": 1, "b": 2}), ("multiply", {"a": 3, "b": 4})))
    texts = spans(job, two)
    assert [learned for learned, _ in texts] == [True, False, True, False, True]
    assert "Sum: 3" in texts[1][1]
    assert '"multiply"' in texts[2][1]
    assert "Product: 12" in texts[3][1]
    assert texts[4][1] == "Product: 12<|im_end|>"


def test_the_last_turn_is_a_final_tools_call_or_none_where_none_is_asked_for(job):
    def changed(**options):
        return dataclasses.replace(job, config=dataclasses.replace(job.config, **options))

    rows = row(("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4}))
    done = gold(changed(stop_after_tools=True), rows)
    assert spans(job, done) == spans(job, gold(job, rows))[:1]  # the first turn of calls is all there will be
    assert (done.status, [m["role"] for m in done.messages]) == ("tools_done", ["assistant", "tool"])

    def say(text: str) -> str:
        """Say it."""
        return text

    functions = {**job.toolbox.functions, "say": say}
    toolbox = tools_of(list(functions.values()))
    final = gold(dataclasses.replace(changed(final_tool="say"), toolbox=toolbox), rows)
    call = {"name": "say", "arguments": {"text": "Sum: 7"}}
    assert spans(job, final)[-1] == (True, f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>")
    assert final.messages[-1]["content"] == "Sum: 7"
    assert [one.name for one, _ in final.calls] == ["add", "add"]


def test_a_final_call_is_written_as_its_tool_takes_it(job):
    """Of a text that is JSON; where the tool takes neither, the model would learn a call that never ends."""

    def last(answer, kind):
        def submit(result) -> str:
            """Give the answer."""
            return str(result)

        submit.__annotations__["result"] = kind
        functions = {**job.toolbox.functions, "submit": submit}
        config = dataclasses.replace(job.config, final_tool="submit")
        return dataclasses.replace(job, config=config, toolbox=tools_of(list(functions.values()))).last_turn(
            answer
        )

    assert last("42", str) == ToolCall("submit", {"result": "42"})
    assert last("42", int) == ToolCall("submit", {"result": 42})
    assert last('{"sum": 7}', dict[str, int]) == ToolCall("submit", {"result": {"sum": 7}})
    with pytest.raises(
        ValueError, match=r"the final tool submit does not take the answer 'Sum: 7' as its 'result'"
    ):
        last("Sum: 7", int)


def test_turns_may_count_equally(job):
    """Loss of a row with a log-likelihood of -1 in its call and -3 in its text: 2, and by tokens nearer to 1."""
    trajectory = gold(job, row(("add", {"a": 1, "b": 2})))
    n = len(job.conversation.assistant_ids("Sum: 3", []))
    sampled = np.flatnonzero(trajectory.sampled_mask)
    N = len(sampled)
    logprobs = jnp.where(jnp.arange(N) < N - n, -1.0, -3.0)[None]
    weights = jnp.array(cold_start.turns_weighted(trajectory).logprobs)[sampled][None]
    given = LossInputs(logprobs, 0 * logprobs, logprobs < 0, weights, None, None, jnp.zeros(1))
    totals = Totals(*[jnp.array(N)] * len(Totals._fields))
    assert float(turns_objective(given, totals)[0]) == pytest.approx(2.0)
    assert float(sft_objective(given, totals)[0]) == pytest.approx(1 + 2 * n / N)


def test_a_gold_row_is_the_conversation_that_a_reward_would_see(job):
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert gold(job, row(("add", {"a": 1, "b": 2}))).messages == [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": "add", "content": "Sum: 3"},
        {"role": "assistant", "content": "Sum: 3"},
    ]


# The rule that ends it


@pytest.fixture
def validations(monkeypatch):
    """Replaces the validation by figures of the test's own; records what it was asked to evaluate."""
    asked, figures = [], []

    def validate(job, params, data, title, limit, stop):
        asked.append([prompt.example.answer for prompt in data.prompts])
        figure = figures[len(asked) - 1]
        match, grounded = figure if isinstance(figure, tuple) else (figure, None)
        return sft_evaluation({"exact_answer_match": match, "answer_grounded": grounded})

    monkeypatch.setattr(cold_start, "evaluate", validate)
    # the rule does not depend on what the updates do, and this one needs no compiling
    monkeypatch.setattr(cold_start, "make_update", lambda *_: lambda state, *_: (state, {"loss": 0.0}))
    return asked, figures


def sft_evaluation(summary):
    return type("Evaluation", (), {"summary": summary})


def test_it_stops_at_the_first_validation_that_is_good_enough(tmp_path, validations, monkeypatch):
    """Looks after 8 and 16 updates; past half of the stop, after 2 more."""
    asked, figures = validations
    figures += [0.0, 0.39, 0.4, 1.0]
    trained = []
    make = cold_start.make_batch

    def recorded(tree, trajectories, **rest):
        trained.extend(trajectory.messages[-1]["content"] for trajectory in trajectories)
        return make(tree, trajectories, **rest)

    monkeypatch.setattr(cold_start, "make_batch", recorded)
    settings = {"sft_eval_steps": 8, "sft_max_steps": 20, "sft_stop_match": 0.4, "sft_validation_size": 4}
    with opened(tmp_path / "run", **settings) as (job, data):
        report = cold_start.fine_tune(job, data, tmp_path / "model")
    assert report == {"steps": 18, "validation": {"exact_answer_match": 0.4, "answer_grounded": None}}
    held_out = [row["answer"] for row in launch.rows(30, 4)]  # the last 4 of rows 10 to 33
    assert asked == [held_out] * 3
    assert len(trained) == 18 * 8
    assert not set(trained) & set(held_out)
    assert (tmp_path / "model/model.safetensors").exists()


def test_it_waits_for_grounded_answers_where_asked(tmp_path, validations):
    """Looks after 8 and 16 updates; once both figures are past half of the stop, after 2 more."""
    asked, figures = validations
    figures += [(1.0, 0.0), (1.0, 0.3), (0.3, 0.9), (0.9, 0.5)]
    settings = {"sft_eval_steps": 8, "sft_max_steps": 30, "sft_stop_match": 0.4, "sft_stop_grounded": 0.5}
    with opened(tmp_path / "run", **settings) as (job, data):
        report = cold_start.fine_tune(job, data, tmp_path / "model")
    assert report["steps"] == 20 and len(asked) == 4


def test_it_stops_at_the_mean_reward_of_sampled_completions(tmp_path, validations, monkeypatch):
    """One completion of each validation row, drawn as in training, scored by the job's rewards with their weights."""
    asked, _ = validations
    drawn, rewards = [], iter([0.0, 0.3, 0.4])

    def complete(job, loop, policy, data, title, generations, stop):
        drawn.append((loop.sampler is job.sampled, len(data.prompts), generations, loop.limit))
        return cold_start.gold_trajectories(job, data.prompts)

    def rewarded(job, trajectories, now):
        reward = next(rewards)
        values = [[2 * reward, 0.0], [0.0, np.nan], [reward, reward], [0.0, reward]]
        return RewardOutcome(np.array(values), {}, {})

    monkeypatch.setattr(cold_start, "completions", complete)
    monkeypatch.setattr(cold_start, "make_policy", lambda loop, params: None)
    monkeypatch.setattr(Job, "score_all", rewarded)
    settings = {"sft_eval_steps": 8, "sft_max_steps": 30, "sft_validation_size": 4, "sft_stop_reward": 0.29}
    settings |= {"reward_fn": ["accuracy", "grounded"], "reward_weights": [0.5, 1.0]}
    with opened(tmp_path / "run", **settings) as (job, data):
        report = cold_start.fine_tune(job, data, tmp_path / "model")
    # the mean of r, 0, 1.5 r, r is 0.875 r: 0, 0.2625 (over half), 0.35
    assert report["steps"] == 18 and report["validation"]["reward"] == pytest.approx(0.35)
    assert drawn == [(True, 4, 1, drawn[0][3])] * 3 and not asked


def test_every_option_of_adapters_decides_what_a_cold_start_continues():
    assert [name for name in OPTIONS if "lora" in name and not name.startswith(cold_start.OPTIONS)] == []


@pytest.mark.parametrize("differs", ["optimizer", "place", "digest"])
def test_a_checkpoint_of_an_earlier_version_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, differs):
    monkeypatch.setattr(cold_start, "_digest", lambda *_: "the same")
    with opened(tmp_path / "run", max_grpo_completion_length=120) as (job, data):
        _, state, _ = cold_start._update_and_state(job)
        meta = {"at": dataclasses.asdict(cold_start._Progress(2, done=3)), "of": "the same"}
        if differs == "optimizer":
            state = dataclasses.replace(state, opt_state={"count": jnp.int32(3)})
        else:
            meta.pop("at" if differs == "place" else "of")
        left = tmp_path / "run/model_checkpoint"
        with Checkpoints(left) as checkpoints:
            checkpoints.save(3, state, meta)
        with pytest.raises(ValueError) as raised:
            cold_start.fine_tune(job, data, tmp_path / "run/model")
    assert str(raised.value) == (
        f"the cold start cannot continue from {left}: the checkpoint there is damaged, or an earlier version of "
        "grpo_jax wrote it; delete that folder to begin the cold start again"
    )


def test_it_stops_at_sft_max_steps_and_validates_there(tmp_path, validations):
    asked, figures = validations
    figures += [0.0, 0.1]
    with opened(tmp_path / "run", sft_eval_steps=2, sft_max_steps=3) as (job, data):
        report = cold_start.fine_tune(job, data, tmp_path / "model")
    assert report == {"steps": 3, "validation": {"exact_answer_match": 0.1, "answer_grounded": None}}
    assert len(asked) == 2


def test_a_validation_is_short_and_says_when_it_takes_longer_than_the_updates_before_it(
    tmp_path, validations, monkeypatch
):
    """Its completions may be twice as long as the longest gold conversation; the first validation compiles."""
    _, figures = validations
    figures += [0.0] * 3
    lines, limits, gold, validate, made = [], [], [], cold_start.evaluate, cold_start.gold_trajectories

    def slow(*args):
        limits.append(args[4])
        time.sleep(1.0)
        return validate(*args)

    def recorded(*args):
        gold.extend(made(*args))
        return gold

    monkeypatch.setattr(cold_start, "evaluate", slow)
    monkeypatch.setattr(cold_start, "gold_trajectories", recorded)
    with opened(tmp_path / "run", sft_eval_steps=1, sft_max_steps=3) as (job, data):
        monkeypatch.setattr(job.console, "line", lines.append)
        cold_start.fine_tune(job, data, tmp_path / "model")
    assert limits == [2 * max(len(trajectory.completion_ids) for trajectory in gold)] * 3
    said = [line for line in lines if line.startswith("Validation took 1 s")]
    assert len(said) == 2 and "sft_eval_steps" in said[0]


def test_weights_moments_and_files_are_as_the_options_say(tmp_path, validations, monkeypatch):
    _, figures = validations
    figures += [1.0]
    states = []
    monkeypatch.setattr(
        cold_start,
        "make_update",
        lambda *args: states.append(args[3]) or (lambda state, *_: (state, {"loss": 0.0})),
    )
    options = {"param_dtype": "bfloat16", "optim_dtype": "bfloat16", "max_shard_size": "50KB"}
    with opened(tmp_path / "run", sft_max_steps=1, **options) as (job, data):
        cold_start.fine_tune(job, data, tmp_path / "model")
    weights, moments = (jax.tree.leaves(x) for x in (states[0].params, states[0].opt_state))
    assert {x.dtype.name for x in weights} == {"bfloat16"}
    assert {x.dtype.name for x in moments} == {"bfloat16", "int32"}  # the counters of updates
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "model/model.safetensors.index.json").exists()
    tensors = {name: x for file in files for name, x in load_file(file).items()}
    source = load_file(launch.small_model() / "model.safetensors")
    assert tensors.keys() == source.keys()
    for name, x in source.items():
        np.testing.assert_array_equal(tensors[name], x.astype(jnp.bfloat16), strict=True)


def test_too_few_rows_for_training_and_validation_are_an_error(tmp_path):
    with (
        opened(tmp_path / "run", sft_validation_size=17) as (job, data),
        pytest.raises(
            ValueError, match=r"sft_validation_size 17 \+ sft_batch_size 8 rows, got 24; lower one of them"
        ),
    ):
        cold_start.fine_tune(job, data, tmp_path / "model")


# Gold calls that do not run


def with_bad_calls(folder, bad: range, arguments: dict) -> str:
    """Rows 10 to 33, some with other arguments of their gold call; the last 4 are the validation."""
    rows = launch.rows(10, 24)
    for i in bad:
        rows[i]["tool_call"]["arguments"] = rows[i]["tool_call"]["arguments"] | arguments
    return str(launch.write_rows(folder / "rows.jsonl", rows))


def record_lines(job, monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(job.console, "line", lines.append)
    return lines


@pytest.fixture
def trained(monkeypatch):
    """The last messages of the rows that updates see."""
    seen, make = [], cold_start.make_batch

    def recorded(tree, trajectories, **rest):
        seen.extend(trajectory.messages[-1]["content"] for trajectory in trajectories)
        return make(tree, trajectories, **rest)

    monkeypatch.setattr(cold_start, "make_batch", recorded)
    return seen


def test_rows_whose_gold_call_does_not_run_are_left_out_with_a_warning(
    tmp_path, validations, trained, monkeypatch
):
    validations[1].append(1.0)
    path = with_bad_calls(tmp_path, range(3, 7), {"city": "Bonn"})
    with opened(tmp_path / "run", dataset_id_or_path=path, sft_max_steps=2, sft_eval_steps=2) as (
        job,
        data,
    ):
        lines = record_lines(job, monkeypatch)
        cold_start.fine_tune(job, data, tmp_path / "model")
    (warning,) = [line for line in lines if line.startswith("Warning: ")]
    assert re.fullmatch(
        rf"Warning: the gold calls of 4 of 20 rows do not run, and fine-tuning leaves these rows out; the first, "
        rf"{path}:4: \w+\(.*city='Bonn'\) returns \"Error: wrong arguments for .*; correct the call or the tool",
        warning,
    )
    answers = [row["answer"] for row in launch.rows(10, 20)]
    assert sorted(trained) == sorted(answers[:3] + answers[7:])  # 2 batches of 8: each of them once


def test_rows_without_a_gold_call_are_left_out_and_counted(tmp_path, validations, trained, monkeypatch):
    """GRPO learns them by their rewards. The validation asks them too."""
    validations[1].append(1.0)
    rows = launch.rows(10, 24)
    for i in (*range(3, 7), 21):
        del rows[i]["tool_call"]
    path = str(launch.write_rows(tmp_path / "rows.jsonl", rows))
    with opened(tmp_path / "run", dataset_id_or_path=path, sft_max_steps=2, sft_eval_steps=2) as (
        job,
        data,
    ):
        lines = record_lines(job, monkeypatch)
        cold_start.fine_tune(job, data, tmp_path / "model")
    assert "Fine-tuning leaves out 4 of 24 rows, which have no gold call" in lines
    answers = [row["answer"] for row in launch.rows(10, 20)]
    assert sorted(trained) == sorted(answers[:3] + answers[7:])  # 2 batches of 8: each of them once


def test_nulls_of_other_tools_are_no_reason_to_leave_a_row_out(tmp_path, validations, trained, monkeypatch):
    validations[1].append(1.0)
    path = with_bad_calls(tmp_path, range(24), {"city": None})
    with opened(tmp_path / "run", dataset_id_or_path=path, sft_max_steps=2, sft_eval_steps=2) as (
        job,
        data,
    ):
        lines = record_lines(job, monkeypatch)
        cold_start.fine_tune(job, data, tmp_path / "model")
    assert lines and not any("Warning" in line for line in lines)
    assert set(trained) <= {row["answer"] for row in launch.rows(10, 20)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            range(24),
            r"no gold call of the 20 rows to fine-tune on runs; the first, .*:1: .* returns \"Error: wrong",
        ),
        (
            range(13),
            r"the gold calls of 13 of 20 rows do not run, and the 7 others are fewer than sft_batch_size, 8",
        ),
    ],
)
def test_too_few_gold_calls_that_run_are_an_error(tmp_path, bad, message):
    path = with_bad_calls(tmp_path, bad, {"city": "Bonn"})
    with (
        opened(tmp_path / "run", dataset_id_or_path=path) as (job, data),
        pytest.raises(ValueError, match=message),
    ):
        cold_start.fine_tune(job, data, tmp_path / "model")


def test_an_error_that_is_the_answer_is_learned(tmp_path, validations, trained):
    """A row may ask for what the tool refuses."""
    validations[1].append(1.0)
    path = with_bad_calls(tmp_path, range(20), {"city": "Bonn"})
    options = {"sft_max_steps": 1, "max_grpo_completion_length": 200}
    with opened(tmp_path / "run", dataset_id_or_path=path, **options) as (job, data):
        results = cold_start.gold_trajectories(job, data.prompts)
        answers = [trajectory.calls[-1][1].text for trajectory in results]
        prompts = [
            dataclasses.replace(p, example=dataclasses.replace(p.example, answer=a))
            for p, a in zip(data.prompts, answers, strict=True)
        ]
        cold_start.fine_tune(job, dataclasses.replace(data, prompts=prompts), tmp_path / "model")
    assert len(trained) == 8 and all(text.startswith("Error: ") for text in trained)


# The command


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_stopped_cold_start_is_continued_or_removed_where_asked(tmp_path, monkeypatch, overwrite):
    """The user's own file stays."""
    folder = tmp_path / "run"
    for name in ("model_checkpoint/4/state", "model/config.json", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")

    def stopped(*_):
        raise Stopped("in the cold start")

    monkeypatch.setattr(sft, "fine_tune", stopped)
    ran = launch.call(sft.main, launch.options(folder, overwrite_output_dir=overwrite), folder)
    assert ran.status == 130, ran.err
    left = {"notes.txt", "resolved_config.yaml"} | (set() if overwrite else {"model", "model_checkpoint"})
    assert {path.name for path in folder.iterdir()} == left


def test_the_command_learns_the_calls_and_never_opens_the_test_file(tmp_path):
    ran = launch.call(
        sft.main,
        launch.options(
            tmp_path / "run",
            eval_dataset_id_or_path=tmp_path / "does not exist.jsonl",
            sft_learning_rate=1e-2,
            sft_max_steps=16,
            sft_eval_steps=8,
        ),
        tmp_path / "run",
    )
    assert ran.status == 0, ran.err
    losses = [float(x) for x in re.findall(r"cold start \d+: loss ([\d.]+)", ran.out)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 6.2  # ln 512 = 6.24 nats: uniform guessing
    assert {path.name for path in ran.folder.iterdir()} == {"model", "resolved_config.yaml", "sft.json"}
    report = ran.json("sft.json")
    assert report["steps"] == 16
    assert report["validation"]["n"] == 4
    assert report["timings"]["cold_start"] > 0
    assert ran.weights() != (launch.small_model() / "model.safetensors").read_bytes()
    assert "Fine-tuned for 16 updates" in ran.out
    again = launch.call(sft.main, launch.options(ran.folder, seed=7, sft_max_steps=2), ran.folder)
    assert again.status == 0, again.err
    assert (
        f"The fine-tuning in {ran.folder} is finished (sft.json, model/). --overwrite_output_dir" in again.out
    )
    assert again.weights() == ran.weights()


@pytest.mark.parametrize(("main", "holds"), [(sft.main, "summary.json"), (train.main, "sft.json")])
def test_the_model_of_the_other_command_is_not_replaced(tmp_path, main, holds):
    launch.write(tmp_path / "run" / holds, "{}")
    ran = launch.call(main, launch.options(tmp_path / "run"), tmp_path / "run")
    assert ran.status == 2
    assert f"output_dir {tmp_path / 'run'} holds a" in ran.err and "--overwrite_output_dir" in ran.err
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".run.lock"} == {holds}


def test_a_checkpoint_of_a_cold_start_is_no_model_and_no_start(tmp_path):
    with opened(tmp_path / "run", max_grpo_completion_length=120) as (job, _):
        _, state, _ = cold_start._update_and_state(job)
        with Checkpoints(tmp_path / "run/model_checkpoint") as checkpoints:
            checkpoints.save(3, state, {"at": {}, "of": "x"})
    step = tmp_path / "run/model_checkpoint/3"
    for options in ({"model_name_or_path": step}, {"resume_from_checkpoint": step}):
        ran = launch.call(train.main, launch.options(tmp_path / "new", **options), tmp_path / "new")
        assert ran.status == 2, ran.err
        assert "of a cold start" in ran.err
