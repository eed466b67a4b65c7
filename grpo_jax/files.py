"""Files that are whole or not there, values as JSON has them, and errors that name the file."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.text import replace_lone_surrogates

MAX_DEPTH = 100  # of a structure that is written as JSON; a deeper one probably holds itself


def is_url(path: str) -> bool:
    """Whether a path names a place in a store, as gs://bucket/folder does."""
    return "://" in path


class OutputError(RuntimeError):
    """A file of the results cannot be written; the message names it and the reason in one line."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A block that writes a file: what the system refuses in it becomes an error that names the file.

    Raises:
        OutputError: no space, no permission, a folder that is gone.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error.strerror or str(error)) from None


def cannot_write(path: str | os.PathLike, reason: str) -> OutputError:
    """The error for a file that cannot be written."""
    return OutputError(
        f"cannot write {path}: {reason}. What was saved before is intact: make the folder writable or free "
        "space there and run the same command again, or choose another output folder"
    )


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a file whole or not at all: a reader, or a kill, never meets half of it.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)  # on a full disk, half a file takes space
            raise


def whole_lines(path: Path) -> list[str]:
    """The lines of a file of JSON objects, each with its line feed; a last one torn by a kill is left out.

    Only a line feed ends a line: texts may hold other separators.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [line + "\n" for line in lines if line.endswith("}")]


def plain(value: Any) -> Any:
    """The same value in JSON's types.

    Numbers are taken out of arrays, what is not finite becomes null, and what JSON has no type for (a set, a
    date, an object, a structure that holds itself) becomes its text.
    """
    try:
        return _plain(value)
    except Exception:  # too deep, or one of its own methods fails
        return _text(value)


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise RecursionError
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, dict):
        return {_text(key): _plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int) and value.bit_length() < 1000:  # json refuses those of over 4300 digits
        return int(value)
    if (tolist := getattr(value, "tolist", None)) is not None:  # arrays and their scalars
        listed = tolist()
        if listed is None or isinstance(listed, list | str | float | int):
            return _plain(listed, depth + 1)
    return _text(value)


def _text(value: Any) -> str:
    try:
        return replace_lone_surrogates(str(value))
    except Exception:  # its own __str__ fails
        return f"<{type(value).__name__}>"


def save_tensors(tensors: dict[str, Any], path: Path) -> None:
    """Write numpy arrays by name as a safetensors file with the permissions of any other new file."""
    from safetensors.numpy import save_file  # not where only types and data are imported

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors writes one that only its owner may read
