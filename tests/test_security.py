"""What SECURITY.md says, line by line, where no other test holds it."""

import ast
import json
import os
import pickle
import shutil
import subprocess
from unittest import mock

import launch
import pytest

from grpo_jax.models import hf
from grpo_jax.rollout.conversation import load_conversation
from grpo_jax.tools import Isolation, Limits, ToolRunner, load_tools
from grpo_jax.tools.isolation import SANDBOXES
from grpo_jax.types import Outcome, ToolCall

TOOLS = '''
import os, signal, socket, time

def variables() -> str:
    """Names of the environment variables."""
    return " ".join(sorted(os.environ))

def processes() -> str:
    """Numbers of the processes that it sees."""
    return " ".join(name for name in os.listdir("/proc") if name.isdigit())

def connect(port: int) -> str:
    """Connect to this machine."""
    socket.create_connection(("127.0.0.1", port), timeout=2).close()
    return "connected"

def write(path: str) -> str:
    """Write a file."""
    with open(path, "w") as file:
        file.write("x")
    return "written"

def temporary() -> str:
    """Write a temporary file."""
    import tempfile
    with tempfile.NamedTemporaryFile() as file:
        return file.name

def die() -> str:
    """Be killed by a signal."""
    os.kill(os.getpid(), signal.SIGSEGV)

def hang() -> str:
    """Hang."""
    while True:
        time.sleep(1)

TOOL_FUNCTIONS = [variables, processes, connect, write, temporary, die, hang]
'''


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory):
    return load_tools(launch.write(tmp_path_factory.mktemp("tools") / "curious.py", TOOLS))


def call(name, **arguments):
    return ToolCall(name, arguments)


SECRETS = {
    "OPENAI_API_KEY": "k",
    "DATABASE_URL": "u",
    "AWS_SECRET_ACCESS_KEY": "s",
    "PYTHON_KEYRING_TOKEN": "t",
    "SEARCH_A": "a",
    "SEARCH_B": "b",
}


def test_secrets_do_not_reach_a_worker_unless_they_are_named(toolbox):
    with mock.patch.dict(os.environ, SECRETS):
        for named, expected in (
            ((), set()),
            (("DATABASE_URL", "SEARCH_*"), {"DATABASE_URL", "SEARCH_A", "SEARCH_B"}),
        ):
            with ToolRunner(toolbox, workers=1, isolation=Isolation(named)) as runner:
                seen = set(runner.run([call("variables")])[0].text.split())
            assert seen & SECRETS.keys() == expected
            assert {"PATH", "PYTHONHASHSEED"} <= seen


def test_the_options_reach_the_workers(tmp_path, toolbox):
    argv = launch.options(tmp_path / "run", tool_env=["SEARCH_*"], check=True, tool_sandbox="unshare")
    ran = launch.call(launch.train.main, argv, tmp_path / "run")
    assert ran.status == 2  # the small run's tools are inline
    assert "tool_env and tool_sandbox are for worker processes, and inline tools run in this one" in ran.err


@pytest.mark.parametrize("sandbox", ["unshare", "bubblewrap"])
def test_a_sandbox_has_no_network_and_sees_no_other_process(tmp_path, toolbox, sandbox):
    """Its limits and crashes are those of a worker without one."""
    works = (
        shutil.which(SANDBOXES[sandbox][0])
        and not subprocess.run([*SANDBOXES[sandbox], "true"], capture_output=True).returncode
    )
    if not works:
        with pytest.raises(ValueError, match=f"tool_sandbox {sandbox} does not work here"):
            Isolation(sandbox=sandbox)
        pytest.skip(f"no {sandbox} here")
    import socket

    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        ToolRunner(toolbox, workers=1, limits=Limits(seconds=2), isolation=Isolation((), sandbox)) as runner,
    ):
        port = server.getsockname()[1]
        calls = [call("processes"), call("connect", port=port), call("temporary"), call("die"), call("hang")]
        seen, connected, temporary, died, hung = runner.run(calls, [0] * 5)
        assert (len(seen.text.split()) <= 3, seen.outcome) == (True, Outcome.OK)
        assert connected.text.startswith("Error: ")
        assert temporary.outcome is Outcome.OK
        assert died.text == "Error: die crashed its worker process (SIGSEGV)"
        assert (hung.outcome, hung.text) == (Outcome.TIMEOUT, "Error: hang did not finish within 2 s")
        written = runner.run([call("write", path=str(tmp_path / "file"))])[0].text
        assert (written == "written") == (sandbox == "unshare")
    with ToolRunner(toolbox, workers=1) as runner:
        assert len(runner.run([call("processes")])[0].text.split()) > 3


def test_a_sandbox_that_is_not_there_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(SANDBOXES, "bubblewrap", ("no-such-program",))
    with pytest.raises(ValueError, match=r"tool_sandbox bubblewrap does not work here \(.*no-such-program"):
        Isolation(sandbox="bubblewrap")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_neither_pickles_nor_the_code_of_a_models_folder_are_run(tmp_path):
    folder = shutil.copytree(launch.small_model(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "unpickled")))
    with pytest.raises(FileNotFoundError, match="is a pickle, which is not read"):
        list(hf.stored_tensors(folder))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | {"auto_map": classes}))
    hf.read_config(folder)
    try:
        load_conversation(folder)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    assert not (tmp_path / "unpickled").exists() and not (tmp_path / "ran").exists()


def test_only_messages_between_a_runs_own_processes_are_pickled():
    """No other module imports what unpickles."""
    found = set()
    for path in (launch.ROOT / "grpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {"pickle", "cloudpickle", "dill", "joblib", "shelve", "torch"} & {
                n.split(".")[0] for n in names
            }:
                found.add(str(path.relative_to(launch.ROOT)))
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert ast.literal_eval(node.value) is False, path
    assert found == {"grpo_jax/hosts.py", "grpo_jax/tools/load.py"}
