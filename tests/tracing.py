"""What a function would hold in memory, read from its jaxpr and from XLA."""

from __future__ import annotations

from collections.abc import Iterator

import jax


def largest_array(function, *args) -> int:
    """Elements of the largest array that any operation of the function makes, loops included."""
    return max(v.aval.size for eqn in _equations(jax.make_jaxpr(function)(*args).jaxpr) for v in eqn.outvars)


def temporary_bytes(function, *args, **compiler_options) -> int:
    """XLA's own count of the memory that the compiled function needs in addition to arguments and results."""
    compiled = jax.jit(function).lower(*args).compile(compiler_options)
    return compiled.memory_analysis().temp_size_in_bytes


def _equations(jaxpr) -> Iterator:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)  # a closed jaxpr holds the bare one
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
