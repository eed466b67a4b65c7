"""Loads the user's tools from a file or a module and checks what it finds."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from grpo_jax.tools import hints
from grpo_jax.tools.schema import get_schema
from grpo_jax.tools.user_code import import_file, import_module, users_errors


@dataclasses.dataclass(frozen=True)
class Toolbox:
    """The tools of a run.

    Args:
        functions: name → function, in the user's order.
        schemas: what the model sees of them, in the same order.
        source: the file or module they come from, for messages.
        script: path of the file; None when they come from a module.
        module: name of the module; None when they come from a file.
        factory: the user's `make_tools`, which makes the functions anew for each trajectory; None without state.
    """

    functions: dict[str, Callable]
    schemas: list[dict[str, Any]]
    source: str
    script: str | None = None
    module: str | None = None
    factory: Callable[[], list[Callable]] | None = None

    @property
    def stateful(self) -> bool:
        """Some functions are methods of an object, so a call may change what the next one answers."""
        return self.factory is not None or any(map(_is_object_method, self.functions.values()))


def load_tools(script: str | os.PathLike | None = None, module: str | None = None) -> Toolbox:
    """Load `TOOL_FUNCTIONS = [f, …]`, or `make_tools()` that returns such a list, and read the schemas.

    Args:
        script: path of a Python file; wins over `module`. Its folder becomes importable.
        module: dotted name of an importable module.

    Raises:
        ValueError: nothing to load, a failing import (with the user's own line), no TOOL_FUNCTIONS, an
            entry that is not a function, a name twice, a missing docstring or type hint.
    """
    namespace, source = _import(script, module)
    functions, factory = _exports(namespace, source)
    return Toolbox(
        functions=functions,
        schemas=[get_schema(f) for f in functions.values()],
        source=source,
        script=None if script is None else source,
        module=module if script is None else None,
        factory=factory,
    )


def load_functions(script: str | None, module: str | None) -> dict[str, Callable]:
    """Name → function as `load_tools` finds them, without schemas (what a worker needs)."""
    return _exports(*_import(script, module))[0]


def named_functions(functions: Any, source: str) -> dict[str, Callable]:
    """Name → function of a list of functions.

    Raises:
        ValueError: it is no list, is empty, holds something else than functions or a name twice.
    """
    if not isinstance(functions, list | tuple) or not functions:
        raise ValueError(f"{source} must be a list with at least one function, got {functions!r}")
    named: dict[str, Callable] = {}
    for i, function in enumerate(functions):
        name = getattr(function, "__name__", "")
        if not (inspect.isroutine(function) or hasattr(function, "__wrapped__")) or not name.isidentifier():
            raise ValueError(f"{source}[{i}] must be a function defined with `def`, got {function!r}")
        if name in named:
            both = f"{hints.location(named[name])} and {hints.location(function)}"
            raise ValueError(f"{source} holds the name {name!r} twice ({both}); rename one")
        named[name] = function
    return named


def _exports(namespace: ModuleType, source: str) -> tuple[dict[str, Callable], Callable | None]:
    functions = getattr(namespace, "TOOL_FUNCTIONS", None)
    factory = getattr(namespace, "make_tools", None)
    if functions is None and factory is None:
        raise ValueError(
            f"No TOOL_FUNCTIONS found in {source}; end it with TOOL_FUNCTIONS = [your_function, …]"
        )
    if functions is not None and factory is not None:
        raise ValueError(
            f"{source} exports TOOL_FUNCTIONS and make_tools; keep the list for functions without state, "
            "make_tools for one object per trajectory"
        )
    if functions is not None:
        return named_functions(functions, f"TOOL_FUNCTIONS in {source}"), None
    with users_errors(f"make_tools() in {source}"):
        functions = factory()
    return named_functions(functions, f"make_tools() in {source}"), factory


def _import(script: str | os.PathLike | None, module: str | None) -> tuple[ModuleType, str]:
    if script is not None:
        namespace, path = import_file(script, "tools_script")
        return namespace, str(path)
    if module is None:
        raise ValueError("no tools given; set tools_script to a file or tool_functions_module to a module")
    return import_module(module), module


def _is_object_method(function: Callable) -> bool:
    return inspect.ismethod(function) and not isinstance(function.__self__, type)
