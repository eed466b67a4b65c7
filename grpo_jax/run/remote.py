"""A run whose output_dir is a URL: gs://…, s3://… or any other that fsspec opens.

The run works in a local folder, since locks, appended files and renames need a disk; `publish` copies what is new to the
store, and `fetch` makes the local folder equal to it before a run starts, so that the same command continues on
another machine. The store holds the same files under the same names, and a manifest that lists those that count:

1. A folder that is whole or not there (a checkpoint, a model) is copied file by file, and counts once the manifest,
   one object, names all of its files. One that has changed is taken out of the manifest before it is copied again.
2. Other files are replaced one by one. metrics.jsonl may be ahead of the newest checkpoint, as in any folder;
   resuming drops the later lines.
3. summary.json, which says that a run is finished, is copied after the manifest.

Orbax could write checkpoints to gs:// by itself, and to nothing else (its TensorStore has no other store); all else
would need the local folder anyway, and one way for every store is tested with one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
import zlib
from pathlib import Path
from typing import Any

from grpo_jax import hosts
from grpo_jax.files import cannot_write, is_url
from grpo_jax.run.lock import LOCK
from grpo_jax.text import first_line

_log = logging.getLogger(__name__)
MANIFEST = "published.json"
SUMMARY = "summary.json"
WHOLE = ("base_model", "cold_start", "model", "adapter")
STEPS = ("checkpoints", "cold_start_checkpoint")  # folders of folders that are whole
# W&B has its own server; a database cannot be copied while it is written
LOCAL = ("wandb", "mlflow.db")
UNFINISHED = (".orbax-checkpoint-tmp", ".tmp", ".old")
CHUNK = 16 << 20  # bytes


def open_remote(output_dir: str, report_to: str) -> Remote | None:
    """The store of an output_dir that is a URL; None for a folder.

    Raises:
        ValueError: fsspec does not know the store or lacks its package, or MLflow would write a database here.
    """
    if not is_url(output_dir):
        return None
    if report_to == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ValueError(
            f"report_to mlflow needs MLFLOW_TRACKING_URI when output_dir is a URL, got {output_dir}: a database "
            "cannot be copied while it is written"
        )
    return Remote(output_dir)


class Remote:
    """A run's folder in a store, and the local folder that the run works in.

    Args:
        url: the folder, as gs://bucket/runs/mine.

    Raises:
        ValueError: fsspec does not know the store, or lacks its package.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._store, self._root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"output_dir {url} cannot be opened: {error}") from None
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self.folder = cache / "grpo_jax" / "runs" / f"{self.url.rsplit('/', 1)[-1]}-{digest}"
        self._published: dict[str, list[int]] = {}  # of each file that counts: size and checksum
        # of each file in the store: its local stat, size and checksum
        self._known: dict[str, tuple[tuple[int, int], list[int]]] = {}
        self._lock = threading.Lock()  # a checkpoint is published by the thread that writes it

    def check(self) -> None:
        """Write an object and remove it.

        Raises:
            ValueError: that is not possible; says why.
        """
        probe = self._at(f".{uuid.uuid4().hex}.tmp")
        try:
            self._store.pipe_file(probe, b"x")
            self._store.rm_file(probe)
        except Exception as error:  # every store has its own
            raise ValueError(
                f"output_dir {self.url} cannot be written: {first_line(error)}; check the name, the permissions and "
                "the network"
            ) from None

    def shown(self, path: Path) -> str:
        """A path, in the store if it is the run's."""
        inside = path.absolute().is_relative_to(self.folder)
        return f"{self.url}/{path.absolute().relative_to(self.folder).as_posix()}" if inside else str(path)

    def fetch(self, empty: bool = False) -> str:
        """Make the local folder equal to what the store holds; returns a line that says so.

        What was never published is made again, so that a folder of an earlier or another attempt cannot mix with it.
        Of several hosts the first fetches, and all must see its folder.

        Args:
            empty: leave the local folder empty, since the run starts over; the first `publish` empties the store.

        Raises:
            ValueError: the store cannot be read or written, or the hosts do not share the local folder.
        """
        copied = hosts.of_first(lambda: self._fetch(empty))
        mark = self.folder / f".{hosts.of_first(lambda: uuid.uuid4().hex)}.tmp"
        hosts.of_first(mark.touch)
        seen = hosts.gather(mark.exists)
        hosts.of_first(lambda: mark.unlink(missing_ok=True))
        if not all(seen):
            raise ValueError(
                f"output_dir {self.url}: the hosts of a run share one folder, and {self.folder} is not shared; set "
                "XDG_CACHE_HOME to a shared disk, or mount the bucket and name the mounted folder as output_dir"
            )
        return f"Results: {self.url}, by way of {self.folder}; {copied / 1e6:.1f} MB were fetched"

    def publish(self) -> None:
        """Copy what is new to the store; afterwards it holds the run as it is here. In the first host only.

        Raises:
            OutputError: the store cannot be written. What was published before is intact.
        """
        if not hosts.is_first():
            return
        with self._lock:
            try:
                while not self._publish():  # something was replaced meanwhile
                    pass
            except Exception as error:  # every store has its own
                raise cannot_write(self.url, first_line(error)) from None

    def _fetch(self, empty: bool) -> int:
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._published = json.loads(self._store.cat_file(self._at(MANIFEST)))
        wanted = {} if empty else self._published
        for path in sorted(self.folder.rglob("*"), reverse=True):  # what a folder holds, then the folder
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            elif name not in wanted and name != LOCK and name.split("/")[0] not in LOCAL:
                path.unlink()
        copied, damaged = 0, set()
        for name, figures in wanted.items():
            path, found = self.folder / name, figures
            if not (path.exists() and _figures(path) == figures):
                found, copied = self._download(name), copied + figures[0]
            if found is None or (found != figures and _whole(name)):
                damaged.add(_whole(name))
            else:
                self._known[name] = _stat(path), found
        for folder in damaged - {None}:
            _log.warning("%s/%s is not as it was published and is left out", self.url, folder)
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        if not empty:
            self._download(SUMMARY)  # after the manifest, so not in it
        return copied

    def _publish(self) -> bool:
        """One pass; False where a file was replaced while it was copied."""
        now = {name: _stat(self.folder / name) for name in self._local_files()}
        changed = [n for n, stat in now.items() if n not in self._known or self._known[n][0] != stat]
        gone = {*self._known, *self._published} - now.keys()
        touched = {whole for name in (*changed, *gone) if (whole := _whole(name)) is not None}
        counted = {n: x for n, x in self._published.items() if n in now and _whole(n) not in touched}
        if len(counted) < len(self._published):
            self._write_manifest(counted)
        left = touched - {_whole(name) for name in self._known}  # by a publication that was killed
        for folder in left:
            with contextlib.suppress(FileNotFoundError):
                self._store.rm(self._at(folder), recursive=True)
        for name in changed:
            try:
                self._known[name] = now[name], self._upload(name)
                replaced = _stat(self.folder / name) != now[name]
            except FileNotFoundError:
                replaced = True
            if replaced and _whole(name):
                return False
        sent = {name: self._known[name][1] for name in now if name in self._known}
        if sent != self._published:
            self._write_manifest(sent)
        if (self.folder / SUMMARY).exists():
            self._upload(SUMMARY)
        else:
            gone.add(SUMMARY)
        for name in gone:
            self._known.pop(name, None)
            with contextlib.suppress(FileNotFoundError):
                self._store.rm_file(self._at(name))
        return True

    def _write_manifest(self, files: dict[str, list[int]]) -> None:
        self._store.pipe_file(self._at(MANIFEST), json.dumps(files, indent=0).encode())
        self._published = files

    def _local_files(self) -> list[str]:
        """Names of what is to be published; the summary is not among them."""
        found = []
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(f for f in folders if not _left_out(f))
            found += [
                os.path.relpath(os.path.join(folder, f), self.folder)
                for f in sorted(files)
                if not _left_out(f)
            ]
        return [name for name in found if name != SUMMARY and name.split("/")[0] not in LOCAL]

    def _download(self, name: str) -> list[int] | None:
        """The file's size and checksum; None where there is none."""
        path = self.folder / name
        part = path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._store.open(self._at(name), "rb") as source, part.open("wb") as target:
                figures = _copy(source, target)
        except FileNotFoundError:
            part.unlink(missing_ok=True)
            return None
        os.replace(part, path)
        return figures

    def _upload(self, name: str) -> list[int]:
        with (self.folder / name).open("rb") as source, self._store.open(self._at(name), "wb") as target:
            return _copy(source, target)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def _whole(name: str) -> str | None:
    """The folder that a file is a part of, if it is one that is whole or not there."""
    parts = name.split("/")
    if parts[0] in WHOLE and len(parts) > 1:
        return parts[0]
    return "/".join(parts[:2]) if parts[0] in STEPS and len(parts) > 2 else None


def _left_out(name: str) -> bool:
    """Half-made files and folders, the lock, and checkpoints that were set aside."""
    return name == LOCK or name.endswith(UNFINISHED) or name.startswith(".damaged-") or ".partial-" in name


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _copy(source: Any, target: Any) -> list[int]:
    """Copy a file; its size and checksum."""
    size = checksum = 0
    while chunk := source.read(CHUNK):
        size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
        target.write(chunk)
    return [size, checksum]


def _figures(path: Path) -> list[int]:
    with path.open("rb") as source, open(os.devnull, "wb") as target:
        return _copy(source, target)
