"""Communication between the processes of a run; there is one per host, and all run the same program.

Each decodes its own rows with all others, runs their tool calls and scores them; everything that decides
what runs next on the devices is agreed upon here first, because a process that runs anything other than the
others hangs them all. All processes call `gather`, `of_first`, `agree`, `check_alike` and `fetch`, in the
same order. With one process nothing here communicates, and errors keep their own path.
Importing this imports no jax: data, tools and rewards are read without it.
"""

from __future__ import annotations

import os
import pickle
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
SMALLEST_MESSAGE = 1024  # bytes; messages are padded to powers of two, so that few programs are compiled
JOIN = "GRPO_JAX_DISTRIBUTED"
HEARTBEAT = 50  # seconds without one until a process counts as dead and all others end; jax's own is 100


class HostError(RuntimeError):
    """One process failed and all end with its message; in that one, `__cause__` is its own error."""


def join_processes(environ: Mapping[str, str] = os.environ) -> None:
    """Connect the processes of a run, before anything touches a device; a single process stays alone.

    `jax.distributed.initialize` finds the others by itself on a known cluster. It is called where srun,
    mpirun or a TPU slice count several processes, where `JAX_COORDINATOR_ADDRESS` is set (with
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` where no cluster knows them), and with `GRPO_JAX_DISTRIBUTED=1`;
    `GRPO_JAX_DISTRIBUTED=0` keeps a process alone.

    Raises:
        ValueError: the variables contradict each other, or jax recognises no cluster.
    """
    asked = environ.get(JOIN, "")
    if asked not in ("", "0", "1"):
        raise ValueError(
            f"{JOIN} must be 1 (join the processes of a cluster) or 0 (stay alone), got {asked!r}"
        )
    numbers = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {name: environ[variable] for name, variable in numbers.items() if variable in environ}
    for name, text in given.items():
        if not text.isdigit():
            raise ValueError(f"{numbers[name]} must be a whole number, got {text!r}")
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and given:
        raise ValueError(
            f"{numbers[next(iter(given))]} is set and JAX_COORDINATOR_ADDRESS is not; set it to HOST:PORT of "
            "process 0, or leave both out"
        )
    if asked == "0" or not (asked or address or _launched_together(environ)):
        return
    import jax

    # jax's own handler of SIGTERM would swallow a signal that comes before training begins; ours stops all hosts
    jax.config.update("jax_enable_preemption_service", False)
    explicit: dict[str, Any] = {"coordinator_address": address} | {
        name: int(text) for name, text in given.items()
    }
    try:
        jax.distributed.initialize(**(explicit if address else {}), heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as error:  # jax's message names its own argument
        raise ValueError(
            f"jax cannot join the processes of a run here: {error} Set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID, or {JOIN}=0 to stay alone"
        ) from error


def _launched_together(environ: Mapping[str, str]) -> bool:
    """Whether a launcher says that it started several processes; a cluster sets them for one too."""
    counts = [environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    if environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        hosts = len(environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
        counts += [environ.get("MEGASCALE_NUM_SLICES", ""), str(hosts)]
    return any(count.isdigit() and int(count) > 1 for count in counts)


def alone() -> bool:
    """Whether this is the only process; starts no backend."""
    jax = sys.modules.get("jax")  # joining others imports it
    return jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """Whether this process writes the files and prints."""
    return alone() or _place()[0] == 0


def share(items: Sequence[T]) -> list[T]:
    """This process's part of a batch; see `part_of`."""
    return list(items) if alone() else part_of(items, *_place())


def part_of(items: Sequence[T], process_index: int, process_count: int) -> list[T]:
    """A process's part of a batch: the parts lie next to each other, in the order of the processes.

    Args:
        items: [P] of the whole batch, the same in every process.

    Returns:
        [P / process_count] of them.

    Raises:
        ValueError: P does not divide by process_count, or there is no such process.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in [0, process_count = {process_count}), got {process_index}"
        )
    size, rest = divmod(len(items), process_count)
    if rest:
        raise ValueError(
            f"the prompts of a batch must divide by the number of processes, {process_count}, got {len(items)}; "
            "change per_device_train_batch_size, gradient_accumulation_steps or num_generations"
        )
    return list(items[process_index * size : (process_index + 1) * size])


def gather(make: Callable[[], T]) -> list[T]:
    """What `make` returns in each process, in their order; where it raises in one, all raise.

    Args:
        make: runs without the other processes; its result can be pickled.

    Raises:
        HostError: it raised in some process; names that process and its error.
    """
    if alone():
        return [make()]
    value, error = None, None
    try:
        value = make()
    except Exception as raised:
        error = raised
    message = pickle.dumps((value, None if error is None else f"{type(error).__name__}: {error}"))
    lengths = agree([len(message)])[:, 0]
    size = max(SMALLEST_MESSAGE, 1 << int(lengths.max() - 1).bit_length())
    padded = _all_gather(np.frombuffer(message.ljust(size, b"\0"), np.uint8))
    answers = [pickle.loads(row[:n].tobytes()) for row, n in zip(padded, lengths, strict=True)]
    for process, (_, problem) in enumerate(answers):
        if problem is not None:
            raise HostError(f"process {process} failed: {problem}") from error
    return [value for value, _ in answers]


def of_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, the only one that calls it; errors as in `gather`."""
    values: list[Any] = gather(lambda: make() if is_first() else None)
    return values[0]


def agree(figures: Sequence[int]) -> np.ndarray:
    """[processes, n] int32: the figures of every process, in one all-gather."""
    own = np.array(figures, np.int32)
    return own[None] if alone() else _all_gather(own)


def check_alike(what: str, value: Any) -> None:
    """Compare a value, by its repr, between the processes.

    Raises:
        ValueError: it is not the same in all of them, which would soon run different programs.
    """
    if alone():
        return
    digests = agree([zlib.crc32(repr(value).encode()) >> 1])[:, 0]
    if (odd := np.flatnonzero(digests != digests[0])).size:
        raise ValueError(
            f"{what} must be the same in every process, got something else in process {odd[0]} than in "
            "process 0; start all with the same options, files and versions"
        )


class Failure:
    """A process that fails between collective calls keeps making them until the others know.

    `with failure: …` keeps the first error of its blocks; `raise_everywhere` raises it. With one
    process the blocks raise at once.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> Failure:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if alone() or not isinstance(error, Exception):
            return False
        self.error = self.error or error
        return True

    def raise_everywhere(self) -> None:
        """All processes call it once `agree` said that one of them failed.

        Raises:
            HostError: see `gather`.
        """

        def own() -> None:
            if self.error is not None:
                raise self.error

        gather(own)


def fetch(tree: Any) -> Any:
    """Whole arrays on the host, also of what lies on other hosts' devices.

    Stacked weights come layer by layer: a device never holds more than one layer's whole weight.
    """
    import jax

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_replicated or x.is_fully_addressable:
            return np.asarray(x)
        if x.ndim < 3:
            return _all_gather(x, tiled=True)
        return np.stack([_all_gather(x[i], tiled=True) for i in range(len(x))])

    return jax.device_get(tree) if alone() else jax.tree.map(whole, tree)


def _place() -> tuple[int, int]:
    """This process's index, and how many there are."""
    import jax

    return jax.process_index(), jax.process_count()


def _all_gather(x: Any, tiled: bool = False) -> np.ndarray:
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(x, tiled=tiled)
