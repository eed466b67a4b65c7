"""What a tool's worker process may see of the machine: its environment variables, and its sandbox."""

from __future__ import annotations

import dataclasses
import fnmatch
import subprocess
from collections.abc import Mapping
from typing import Literal

# Variables that every worker gets: locations of programs, libraries and caches, the language, the number of threads.
VARIABLES = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR", "TEMP", "TMP",
    "PWD", "HOSTNAME", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "XDG_*", "*_NUM_THREADS",
    "NPROC", "CUDA_*", "JAX_PLATFORMS", "XLA_FLAGS", "SSL_CERT_*", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HF_HOME",
)  # fmt: skip
NEVER = ("*KEY*", "*TOKEN*", "*SECRET*", "*PASS*", "*CREDENTIAL*")  # of those, unless they are named

# The program that starts the worker. Both end with it, show it no other processes and no network; bubblewrap also
# makes files read-only. The shell is there because the first process of a namespace does not die of a signal's
# default action, by which a worker without its parent ends.
SANDBOXES: dict[str, tuple[str, ...]] = {
    "none": (),
    "unshare": (
        "unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
        "sh", "-c", '"$@"; exit $?', "sh",
    ),
    "bubblewrap": (
        "bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all", "--die-with-parent",
        "--setenv", "TMPDIR", "/dev/shm", "--",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Isolation:
    """What a worker may see.

    Args:
        variables: names or patterns of the environment variables that it gets in addition to `VARIABLES` (`tool_env`).
        sandbox: the program that starts it (`tool_sandbox`).

    Raises:
        ValueError: the sandbox does not work on this machine; says why.
    """

    variables: tuple[str, ...] = ()
    sandbox: Literal["none", "unshare", "bubblewrap"] = "none"

    def __post_init__(self):
        if not self.prefix:
            return
        try:
            tried = subprocess.run([*self.prefix, "true"], capture_output=True, text=True, timeout=30)
            why = tried.stderr.strip() or f"exit code {tried.returncode}" if tried.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        if why:
            raise ValueError(
                f"tool_sandbox {self.sandbox} does not work here ({why}); install it and allow user namespaces, or choose "
                f"{' or '.join(name for name in SANDBOXES if name != self.sandbox)}"
            )

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words before a worker's own command."""
        return SANDBOXES[self.sandbox]

    def environment(self, of_run: Mapping[str, str]) -> dict[str, str]:
        """The variables that reach a worker, out of those of the run."""

        def fits(name: str, patterns: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

        return {
            name: value
            for name, value in of_run.items()
            if (fits(name, VARIABLES) and not fits(name.upper(), NEVER)) or fits(name, self.variables)
        }

    def exit_code(self, code: int) -> int:
        """The worker's own, negative for a signal, from that of the process that was started."""
        return 128 - code if self.prefix and code > 128 else code
