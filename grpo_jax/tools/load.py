"""Loads the user's tools from a file, a module or Python objects, and checks what it finds."""

from __future__ import annotations

import base64
import copy
import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from grpo_jax.text import nearest
from grpo_jax.tools import hints
from grpo_jax.tools.process_state import users_code
from grpo_jax.tools.schema import get_schema
from grpo_jax.tools.user_code import import_file, import_module, users_errors

_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # what chat templates and services allow


@dataclasses.dataclass(frozen=True)
class Toolbox:
    """The tools of a run.

    Args:
        functions: name → function, in the user's order.
        schemas: what the model sees of them, in the same order.
        source: the file or module they come from, for messages.
        script: path of the file; None when they come from elsewhere.
        module: name of the module; None when they come from elsewhere.
        factory: the user's `make_tools`, which makes the functions anew for each trajectory; None without state.
    """

    functions: dict[str, Callable]
    schemas: list[dict[str, Any]]
    source: str
    script: str | None = None
    module: str | None = None
    factory: Callable[..., list[Callable]] | None = None

    @property
    def stateful(self) -> bool:
        """Some functions are methods of an object, so a call may change what the next one answers."""
        methods = filter(inspect.ismethod, map(inspect.unwrap, self.functions.values()))
        return self.factory is not None or any(not isinstance(m.__self__, type) for m in methods)

    def made_for(self, row: Mapping[str, Any]) -> dict[str, Callable]:
        """Name → function for one trajectory: made anew where there is a factory, which may ask for the row."""
        if self.factory is None:
            return self.functions
        return named_functions(_make(self.factory, row), f"make_tools() in {self.source}")


def load_tools(
    script: str | os.PathLike | None = None, module: str | None = None, row: Mapping[str, Any] | None = None
) -> Toolbox:
    """Load `TOOL_FUNCTIONS = [f, …]`, or `make_tools()` that returns such a list, and read the schemas.

    Args:
        script: path of a Python file; wins over `module`. It finds modules in its own folder first.
        module: dotted name of an importable module.
        row: a data row for a `make_tools(row)`, from whose functions the schemas are read; default, an empty
            one.

    Raises:
        ValueError: nothing to load, a failing import (with the user's own line), no TOOL_FUNCTIONS, an
            entry that is not a function, a name twice, a missing docstring or type hint.
    """
    namespace, source = _import(script, module)
    functions, factory = _exports(namespace, source, row or {})
    return Toolbox(
        functions=functions,
        schemas=[get_schema(f) for f in functions.values()],
        source=source,
        script=None if script is None else source,
        module=module if script is None else None,
        factory=factory,
    )


def tools_of(functions: Sequence[Callable]) -> Toolbox:
    """A toolbox of functions that are given as objects, from a notebook's cell or anywhere else.

    Raises:
        ValueError: it is empty, holds anything other than functions, a name twice, or a function without
            docstring or type hints.
    """
    named = named_functions(functions, "tools")
    return Toolbox(named, [get_schema(f) for f in named.values()], "tools")


def final_tools(toolbox: Toolbox, name: str | None = None) -> dict[str, str]:
    """The tools whose call ends a conversation, each with its one parameter, which is the answer.

    They are those that `typing.final` marks, and the named one.

    Raises:
        ValueError: there is no tool of that name, or a final tool has not exactly one parameter, without a
            default.
    """
    if name is not None and name not in toolbox.functions:
        near = nearest(name, toolbox.functions)[0]
        raise ValueError(f"final_tool must name a tool of {toolbox.source}, got {name!r}; nearest: {near}")
    found = {}
    for schema in toolbox.schemas:
        tool = schema["function"]["name"]
        if tool != name and not getattr(toolbox.functions[tool], "__final__", False):
            continue
        parameters = list(schema["function"]["parameters"]["properties"])
        if len(parameters) != 1:
            raise ValueError(
                f"the final tool {tool} must have one parameter, the answer, got {len(parameters)}: "
                f"{', '.join(parameters) or 'none'} ({hints.location(toolbox.functions[tool])})"
            )
        if not schema["function"]["parameters"].get("required"):
            raise ValueError(
                f"the parameter {parameters[0]} of the final tool {tool} is the answer and must have no default "
                f"({hints.location(toolbox.functions[tool])})"
            )
        found[tool] = parameters[0]
    return found


def load_functions(script: str | None, module: str | None, pickled: str | None = None) -> dict[str, Callable]:
    """Name → function as `load_tools` finds them, without schemas (what a worker needs)."""
    if pickled is None:
        return _exports(*_import(script, module), {})[0]
    import cloudpickle

    with users_errors("reading the functions that were given in Python"):
        return cloudpickle.loads(base64.b64decode(pickled))


def pickled(functions: Mapping[str, Callable]) -> str:
    """The functions as text for `load_functions`: those of importable modules by name, others by value.

    Raises:
        ValueError: one holds something that cannot be copied into a worker process.
    """
    import cloudpickle

    for name, function in functions.items():
        try:
            cloudpickle.dumps(function)
        except Exception as error:  # the __reduce__ of a user's object may raise anything
            raise ValueError(
                f"the tool {name} cannot be copied into worker processes: {error}; create what it holds inside "
                'the function or in a file (tools_script), or set tool_executor="inline"'
            ) from error
    return base64.b64encode(cloudpickle.dumps(dict(functions))).decode()


def named_functions(functions: Any, source: str) -> dict[str, Callable]:
    """Name → function of a list of functions; one with bound arguments (partial) becomes a function of the rest.

    Raises:
        ValueError: it is not a list, is empty, or holds anything other than functions or a name twice.
    """
    if not isinstance(functions, list | tuple) or not functions:
        raise ValueError(f"{source} must be a list with at least one function, got {functions!r}")
    named: dict[str, Callable] = {}
    for i, function in enumerate(functions):
        if isinstance(function, functools.partial):
            function = _without_bound(function)
        name = getattr(function, "__name__", "")
        if name == "<lambda>":
            raise ValueError(
                f"{source}[{i}] must be a function defined with `def`, got a lambda, which has no name that a "
                f"model could call, no type hints and no docstring ({hints.location(function)})"
            )
        if not (inspect.isroutine(function) or hasattr(function, "__wrapped__")):
            raise ValueError(f"{source}[{i}] must be a function defined with `def`, got {function!r}")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{source}[{i}] must have a name of A-Z, a-z, 0-9, '_', '.' and '-', got {name!r}"
            )
        if name in named:
            both = f"{hints.location(named[name])} and {hints.location(function)}"
            raise ValueError(f"{source} contains the name {name!r} twice ({both}); rename one")
        named[name] = function
    return named


def _without_bound(partial: functools.partial) -> Callable:
    """A partial as a function whose signature lacks the bound arguments: no model may change them."""

    if not (inspect.isroutine(partial.func) or hasattr(partial.func, "__wrapped__")):
        return partial  # which is refused: a class or a callable object
    if inspect.isgeneratorfunction(partial.func) or inspect.isasyncgenfunction(partial.func):
        return partial.func  # which is refused

    @functools.wraps(partial.func)
    def tool(**arguments: Any) -> Any:
        return partial(**arguments)

    signature = hints.signature(partial)  # where a hint is wrong the schema will say so
    free = [p for name, p in signature.parameters.items() if name not in partial.keywords]
    kept = {p.name for p in free} | {"return"}
    vars(tool)["__signature__"] = signature.replace(parameters=free)
    tool.__annotations__ = {
        k: v for k, v in getattr(partial.func, "__annotations__", {}).items() if k in kept
    }
    tool.__dict__.update(vars(partial))
    for own in ("__name__", "__doc__"):  # set on the partial itself
        if own in vars(partial):
            setattr(tool, own, vars(partial)[own])
    return tool


def _exports(
    namespace: ModuleType, source: str, row: Mapping[str, Any]
) -> tuple[dict[str, Callable], Callable | None]:
    functions = getattr(namespace, "TOOL_FUNCTIONS", None)
    factory = getattr(namespace, "make_tools", None)
    if functions is not None and factory is not None:
        raise ValueError(
            f"{source} exports TOOL_FUNCTIONS and make_tools; keep the list for functions without state, "
            "make_tools for one object per trajectory"
        )
    if functions is not None:
        return named_functions(functions, f"TOOL_FUNCTIONS in {source}"), None
    if factory is None:
        raise ValueError(
            f"No TOOL_FUNCTIONS found in {source}; end it with TOOL_FUNCTIONS = [your_function, …]"
        )
    empty = (
        " (with an empty row, to read the schemas: use row.get)" if _wants_row(factory) and not row else ""
    )
    with users_code(factory), users_errors(f"make_tools() in {source}{empty}"):
        functions = _make(factory, row)
    return named_functions(functions, f"make_tools() in {source}"), factory


def _make(factory: Callable, row: Mapping[str, Any]) -> Any:
    # A copy: what one trajectory does to the row's tables must not reach another's.
    return factory(copy.deepcopy(dict(row))) if _wants_row(factory) else factory()


def _wants_row(factory: Callable) -> bool:
    return bool(inspect.signature(factory).parameters)


def _import(script: str | os.PathLike | None, module: str | None) -> tuple[ModuleType, str]:
    if script is not None:
        namespace, path = import_file(script, "tools_script")
        return namespace, str(path)
    if module is None:
        raise ValueError("no tools given; set tools_script to a file or tool_functions_module to a module")
    return import_module(module), module
