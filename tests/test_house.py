"""How the package is built: imports point one way, host-side parts need no jax, signatures stay short.

Each list of exceptions is exact: one that no longer applies fails its test and must be taken out.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_jax"

# A module may import its own layer and those before it. Rooms are folders; other names are modules.
LAYERS = [
    {"types", "files", "text", "hosts"},
    {"data", "tools", "models"},
    {"scoring", "update"},
    {"rollout"},
    {"run"},
    {"trainer", "preflight"},
]  # a module not named here is a command, or the package's own __init__
MOST_PARAMETERS = 7

KNOWN_IMPORTS: set[str] = set()  # "module -> module"
KNOWN_JAX: set[str] = set()  # modules that import jax and should not
KNOWN_LONG: set[str] = {
    "trainer:GRPOTrainer.__init__"
}  # "module:function"; the eighth is TRL's other keywords
KNOWN_CONFIG: set[str] = set()  # "module:function"
FORMULAS = {
    "models.qwen:DecoderLayer.__call__",
    "models.qwen:extend",
}  # functions whose parameters are the letters of a formula, or a layer's own inputs


def modules():
    """{dotted name below grpo_jax: syntax tree}."""
    paths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in paths.items()}


MODULES = modules()


def layer(module):
    return next((i for i, names in enumerate(LAYERS) if module.split(".")[0] in names), len(LAYERS))


def imported(module):
    """The modules of grpo_jax that a module imports, at its top or in a function."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by a relative name"
            if node.module == "grpo_jax":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("grpo_jax."):
                name = node.module.removeprefix("grpo_jax.")
                parts = (f"{name}.{alias.name}" for alias in node.names)
                yield from (part if part in MODULES else name for part in parts)
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("grpo_jax.") for a in node.names if a.name.startswith("grpo_jax.")
            )


def functions(module):
    """("module:Class.function", its definition) of every function, nested ones included."""

    def walk(node, path):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            inner = (*path, child.name) if named else path
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}:{'.'.join(inner)}", child
            yield from walk(child, inner)

    return walk(MODULES[module], ())


def parameters(function):
    """All but self and cls."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return every[1:] if every and every[0].arg in ("self", "cls") else every


def test_imports_point_one_way():
    wrong = {
        f"{module} -> {other}"
        for module in MODULES
        for other in imported(module)
        if layer(other) > layer(module)
    }
    assert wrong == KNOWN_IMPORTS


def test_what_users_write_imports_neither_jax_nor_the_package():
    for path in (*ROOT.glob("tools_funcs/**/*.py"), *ROOT.glob("rewards/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"jax", "flax", "grpo_jax"}, path


HOST_SIDE = sorted(
    name
    for name in MODULES
    if name.split(".")[0] in {"types", "files", "text", "hosts", "data", "tools", "scoring"}
)
IMPORTING = """
import importlib, sys
sys.modules["jax"] = None  # importing it is then an error
for name in sys.argv[1:]:
    for loaded in [n for n in sys.modules if n.split(".")[0] == "grpo_jax"]:
        del sys.modules[loaded]
    try:
        importlib.import_module("grpo_jax." + name)
    except ImportError as error:
        print(name, error, file=sys.stderr)
        print(name)
"""


def test_host_side_modules_import_where_there_is_no_jax():
    argv = [sys.executable, "-c", IMPORTING, *HOST_SIDE]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(ran.stdout.split()) == KNOWN_JAX, ran.stderr


def test_no_function_has_more_than_seven_parameters():
    long = {
        name for module in MODULES for name, f in functions(module) if len(parameters(f)) > MOST_PARAMETERS
    }
    assert long - FORMULAS == KNOWN_LONG
    assert long >= FORMULAS, f"no longer so long: {FORMULAS - long}"


def test_the_whole_config_is_read_in_few_places():
    """run/job.py, the trainer, preflight and the commands; run/ also defines and parses it."""

    def takes(function):
        notes = [ast.unparse(p.annotation) for p in parameters(function) if p.annotation is not None]
        return any(note in ("Config", "Config | None", "GRPOConfig") for note in notes)

    below = [
        m for m in MODULES if layer(m) <= layer("run") and m not in ("run.job", "run.options", "run.config")
    ]
    assert {name for module in below for name, f in functions(module) if takes(f)} == KNOWN_CONFIG


@pytest.mark.parametrize("name", conftest.CHECKED)
def test_the_modules_whose_shapes_tests_check_are_there(name):
    """`install_import_hook` says nothing about a name that no module has."""
    assert name in MODULES


@pytest.mark.parametrize(
    "path", sorted(p for d in ("scripts", "benchmarks") for p in (ROOT / d).glob("*.py")), ids=str
)
def test_scripts_import_names_that_there_are(path):
    """Most are run by hand, and a move would leave them behind."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_jax."):
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = hasattr(module, alias.name) or f"{node.module}.{alias.name}"[9:] in MODULES
                assert found, f"{node.module} has no {alias.name}"
