"""What decides a run's result is distinguished from what does not, and differences are named."""

import functools

import launch
import pytest

from grpo_jax.run.identity import differences, run_identity, source_digests
from grpo_jax.scoring.rewards import load_rewards
from grpo_jax.tools import load_tools
from grpo_jax.types import Example, Prompt

TOOL = '''
import helper


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: One.
        b: Two.
    """
    return helper.said(a + b)


TOOL_FUNCTIONS = [add]
'''
HELPER = "from sub.words import WORD\n\n\ndef said(total):\n    return f'{WORD}: {total}'\n"
REWARD = "def reward_func(completions, **kwargs):\n    return [0.0] * len(completions)\n"
NUMBERS = {"seed": 1, "prompts": 2, "num_generations": 4, "num_iterations": 1, "updates": 4}
OPTIONS = {
    "beta": 0.0, "learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_steps": 0.0,
    "output_dir": "x", "seed": 1,
}  # fmt: skip


def example(i, **extra):
    return Example([{"role": "user", "content": f"Add {i}."}], f"Sum: {i}", extra, f"rows.jsonl:{i}")


@pytest.fixture
def job(tmp_path):
    """Files of a job, and its identity with changes."""
    for name, text in (
        ("tools.py", TOOL), ("helper.py", HELPER), ("sub/words.py", "WORD = 'Sum'\n"), ("strict.py", REWARD),
        ("other.py", "X = 1\n"),
    ):  # fmt: skip
        launch.write(tmp_path / name, text)

    def identity(rows=(1, 2, 3), model=None, tokens=7, options=None, **numbers):
        return run_identity(
            [
                Prompt(row if isinstance(row, Example) else example(row), [tokens, i], [])
                for i, row in enumerate(rows)
            ],
            load_tools(tmp_path / "tools.py"),
            load_rewards([str(tmp_path / "strict.py")], None),
            NUMBERS | numbers,
            model or str(tmp_path),
            OPTIONS | (options or {}),
        )

    return tmp_path, identity


def said(then, now):
    return [(one.text, one.refused) for one in differences(then, now)]


def test_the_same_job_differs_in_nothing(job):
    """Where rows were read from, options that do not change what is learned, comments and layout are no difference."""
    folder, identity = job
    then = identity()
    rows = [Example(e.messages, e.answer, e.extra, "moved.jsonl:1") for e in map(example, (1, 2, 3))]
    launch.write(folder / "helper.py", "# a comment\n" + HELPER.replace("(total)", "( total )"))
    launch.write(folder / "other.py", "X = 2\n")
    assert said(then, identity(rows, options={"output_dir": "y"})) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((1, 2), "the training data: 3 rows then, 2 rows now"),
        ((1, 2, 3, 4), "the training data: 3 rows then, 4 rows now"),
        ((1, 2, 4), "the training data: 3 rows as before, but with other contents"),
        ((1, 2, example(3, level=2)), "the training data: 3 rows as before, but with other contents"),
        ((2, 1, 3), "the training data: the same rows in another order"),
    ],
)
def test_other_rows_are_refused(job, rows, message):
    _, identity = job
    assert said(identity(), identity(rows)) == [(message, True)]


def test_a_changed_file_is_named_with_the_modules_that_it_imports(job):
    folder, identity = job
    then = identity()
    assert [*then["tools"]] == ["helper.py", "sub/words.py", "tools.py"]
    launch.write(folder / "sub/words.py", "WORD = 'Total'\n")
    assert said(then, identity()) == [("tools: the source of sub/words.py was changed", True)]
    launch.write(folder / "strict.py", REWARD.replace("0.0", "1.0"))
    assert said(then, identity())[1] == ("reward strict: the source of strict.py was changed", True)


def test_numbers_and_tokens_are_refused_and_options_are_said(job):
    _, identity = job
    then = identity()
    assert said(then, identity(seed=2, prompts=3)) == [
        ("seed: 1 then, 2 now", True),
        ("prompts per update: 2 then, 3 now", True),
    ]
    ((text, refused),) = said(then, identity(tokens=8))
    assert refused and text.startswith("the prompts' tokens: the same rows, but another tokenizer")
    assert said(then, identity(options={"learning_rate": 0.5})) == [
        ("learning_rate: 1.0 then, 0.5 now", False)
    ]
    assert said(identity(options={"optim": "adamw"}), identity(options={"optim": "lion"})) == [
        ("optim: adamw then, lion now", True)
    ]


@pytest.mark.parametrize(
    ("schedule", "warmup", "jumps"),
    [("linear", 0, True), ("polynomial", 0, True), ("inverse_sqrt", 5, False), ("constant", 0, False), ("constant", 0.1, False),
     ("constant_with_warmup", 5, False), ("constant_with_warmup", 0.1, True)],
)  # fmt: skip
def test_more_updates_change_a_schedule_that_depends_on_them(job, schedule, warmup, jumps):
    _, identity = job
    options = {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    ((text, refused),) = said(identity(options=options), identity(options=options, updates=9))
    assert text.startswith("the run's number of updates: 4 then, 9 now")
    assert (f"the {schedule} schedule of the learning rate now ends there" in text) == jumps
    assert not refused


@pytest.mark.parametrize(("beta", "refused"), [(0.0, False), (0.1, True)])
def test_another_model_matters_where_the_kl_needs_it(job, beta, refused):
    """A folder that is gone may have been moved."""
    folder, identity = job
    options = {"beta": beta}
    ((text, is_refused),) = said(identity(options=options), identity(options=options, model="/other"))
    assert text == f"the model: {folder} then, /other now"
    assert is_refused == refused
    assert said(identity(options=options, model="/gone"), identity(options=options)) == []


def test_the_package_of_a_module_is_followed():
    """tools_funcs.financial_tools_complex imports from its subpackage by its full name."""
    file = launch.ROOT / "tools_funcs/financial_tools_complex.py"
    names = [*source_digests(file, [])]
    assert {"financial/tax.py", "financial/common.py", "financial/states.py", "__init__.py"} <= {*names}
    assert all(".." not in name for name in names)


def test_functions_without_a_file_have_their_own_source():
    def first(a):
        return a + 1  # a comment

    def second(a):
        return a + 2

    namespace = {}
    exec("def typed(a):\n    return a + 1\n", namespace)

    class Judge:
        def __call__(self, completions):
            return completions

    partial = functools.partial(first, 1)
    digests = [
        next(iter(source_digests(None, [f]).values()))
        for f in (first, second, namespace["typed"], Judge(), partial)
    ]
    assert len(set(digests)) == 4
    assert digests[0] == digests[4]
