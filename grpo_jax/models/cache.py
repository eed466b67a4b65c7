"""Model folders that are made from other files and kept in the user's cache, under names that say what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grpo_jax.files import writing

CACHE = Path("~/.cache/grpo_jax/models")
# what the names of a tokenizer's files begin with
OF_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template")


def cached_name(stem: str, *parts: Any) -> Path:
    """The cache's folder for a stem and all that decides its content, which need not be there."""
    return CACHE.expanduser() / f"{stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def filled_folder(folder: Path) -> Iterator[Path]:
    """A block that fills a temporary folder, which then is there under its name, or is removed.

    Raises:
        OutputError: it cannot be written.
    """
    part = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    with writing(folder):
        part.mkdir(parents=True)
        try:
            yield part
            if not folder.exists():  # another process may have been as quick
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file of a model folder."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_tokenizer(folder: Path, tokenizer: Path) -> Path:
    """A folder that is a model's, by links, with the tokenizer of another in place of its own."""
    if folder.absolute() == tokenizer.absolute():
        return folder
    files = {file.name: file for file in _files(folder) if not file.name.startswith(OF_TOKENIZER)}
    of_turns = "generation_config.json"  # the tokens that end a turn: its own where it names some
    own = [file for file in _files(tokenizer) if file.name.startswith((*OF_TOKENIZER, of_turns))]
    files |= {file.name: file for file in own}
    made = _cached_files(folder, files.values(), str(tokenizer.absolute()))
    if not made.exists():
        with filled_folder(made) as part:
            for name, file in files.items():
                (part / name).symlink_to(file)
    return made


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.absolute().iterdir() if file.is_file())


def _cached_files(folder: Path, files: Iterable[Path], other: str) -> Path:
    """Where a folder made of files, as they are now, and of something else is kept."""
    folder = folder.absolute()
    return cached_name(folder.name, folder, other, [(f.name, f.stat().st_mtime_ns) for f in files])


def with_template(folder: Path, template: str) -> Path:
    """A folder that is another one, by links, with a chat template in place of its own."""
    files = _files(folder)
    made = _cached_files(folder, files, template)
    if made.exists():
        return made
    with filled_folder(made) as part:
        for file in files:
            if file.name == "tokenizer_config.json":
                settings = json.loads(file.read_text(encoding="utf-8"))
                settings.pop("chat_template", None)
                write_json(part / file.name, settings)
            elif not file.name.startswith("chat_template."):
                (part / file.name).symlink_to(file)
        (part / "chat_template.jinja").write_text(template, encoding="utf-8")
    return made
