"""Files that are whole or not there, and the whole lines of one that may not be."""

from __future__ import annotations

import os
from pathlib import Path


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a file whole or not at all: a reader, or a kill, never meets half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file of JSON objects, each with its line feed; a last one torn by a kill is left out.

    Only a line feed ends a line: texts may hold other separators.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [line + "\n" for line in lines if line.endswith("}")]
