"""Checkpoints come back bit for bit, survive a cut-off save, and say what is wrong with a folder."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.run.checkpoint import Checkpoints, Start, find_start
from grpo_jax.run.stopping import StopSignal
from grpo_jax.run.weights import source_of
from grpo_jax.update.optimizer import in_float32, make_optimizer, make_rule
from grpo_jax.update.update import TrainState

META = {"cursor": {"epoch": 1, "next_index": 40}, "threads": 2, "timings": {"rollout": 1.5}}
ROOT = Path(__file__).parents[1]


def make_state(step=3, width=4):
    """A state after one AdamW update, so that no leaf is trivially zero."""
    keys = jax.random.split(jax.random.key(step), 2)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (8, width))},
        "layers": {"attn": {"q": jax.random.normal(keys[1], (2, width, 3)).astype(jnp.bfloat16)}},
        "norm": {"scale": jnp.ones(width)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.float32))
    _, opt_state = tx.update(params, tx.init(params), params)
    return TrainState(step=jnp.int32(step), params=params, opt_state=opt_state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(got, expected):
    """Same structure (NamedTuple types included), dtypes and bytes."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def run_python(code, *args):
    """Starts the code in a fresh process at the repository's root."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("async_save", [True, False])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path, async_save):
    state = make_state()
    with Checkpoints(tmp_path / "checkpoints", async_save=async_save) as checkpoints:
        checkpoints.save(3, state, META)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 3
        restored, meta = checkpoints.restore(3, abstract(state))
        assert_same_bits(restored, state)
        assert type(restored.opt_state[1][0]) is optax.ScaleByAdamState
        assert meta == META
        assert_same_bits(checkpoints.restore_params(3, abstract(state.params)), state.params)


def test_a_save_is_a_copy_that_donation_does_not_reach(tmp_path):
    """Without a copy the background write would see the buffers of later steps (20 MB: it is still busy)."""
    update = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    params = {"w": jnp.zeros((5, 1000, 1000))}
    target = abstract(params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, TrainState(step=jnp.int32(1), params=params, opt_state=()), {})
        for _ in range(5):
            params = update(params)
        jax.block_until_ready(params)
        assert not np.asarray(checkpoints.restore_params(1, target)["w"]).any()


def test_a_relative_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        monkeypatch.chdir("/")
        checkpoints.save(1, make_state(), {})
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_looking_into_a_missing_folder_does_not_make_it(tmp_path):
    with Checkpoints(tmp_path / "typo") as checkpoints:
        assert (checkpoints.latest(), checkpoints.steps()) == (None, [])
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(("keep", "left"), [(2, [2, 10]), (None, [1, 2, 10])])
def test_the_newest_are_kept(tmp_path, keep, left):
    """Newest by number: by name 10 would come before 2."""
    with Checkpoints(tmp_path, keep=keep) as checkpoints:
        for step in (1, 2, 10):
            checkpoints.save(step, make_state(step), {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == left
        assert checkpoints.restore(left[0], abstract(make_state()))[1] == {"step": left[0]}
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == left


def test_the_best_is_kept_beside_the_newest_until_another_is(tmp_path):
    left = []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 8):
            checkpoints.keep_best(2 if step < 6 else 6)
            checkpoints.save(step, make_state(step), {})
            checkpoints.wait()
            left.append(checkpoints.steps())
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]


@pytest.mark.parametrize("step", [4, 5])
def test_an_existing_or_older_step_is_refused(tmp_path, step):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5), {})
        with pytest.raises(ValueError, match=rf"cannot save step {step}: .* already holds step 5.*overwrite"):
            checkpoints.save(step, make_state(step), {})
        assert checkpoints.steps() == [5]


def test_a_save_that_is_cut_off_leaves_the_previous_step(tmp_path):
    """The process dies while step 2 is written (keep 1); step 1 is whole and step 2 can be saved again."""
    child = run_python(
        """
        import os, sys
        import jax.numpy as jnp, numpy as np
        from grpo_jax.run.checkpoint import Checkpoints
        from grpo_jax.update.update import TrainState
        def state(step):
            w = jnp.asarray(np.random.default_rng(step).random((5000, 1000), np.float32))
            return TrainState(step=jnp.int32(step), params={"w": w}, opt_state=())
        checkpoints = Checkpoints(sys.argv[1], keep=1)
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        checkpoints.save(2, state(2), {})
        os._exit(9)
        """,
        tmp_path,
    )
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 9, errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]

    w = jnp.asarray(np.random.default_rng(1).random((5000, 1000), np.float32))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [1]
        assert_same_bits(checkpoints.restore_params(1, abstract({"w": w})), {"w": w})
        checkpoints.save(2, TrainState(step=jnp.int32(2), params={"w": w}, opt_state=()), {})
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_a_full_disk_is_one_line_and_leaves_the_previous_step(tmp_path):
    """A limit on the size of files stands for the disk; step 2 fails in the background, and `check` says so."""
    child = run_python(
        """
        import resource, sys, time
        import jax.numpy as jnp, numpy as np
        from grpo_jax.files import OutputError
        from grpo_jax.run.checkpoint import Checkpoints
        from grpo_jax.update.update import TrainState
        def state(step, n):
            w = jnp.asarray(np.random.default_rng(step).random((n, 1000), np.float32))
            return TrainState(step=jnp.int32(step), params={str(i): w + i for i in range(8)}, opt_state=())
        for keep in (1, None):
            try:
                with Checkpoints(f"{sys.argv[1]}/{keep}", keep=keep) as checkpoints:
                    checkpoints.save(1, state(1, 10), {})
                    checkpoints.wait()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))
                    checkpoints.save(2, state(2, 5000), {})
                    while True:
                        time.sleep(0.02)
                        checkpoints.check()
            except OutputError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        """,
        tmp_path,
    )
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    slow = "WARNING:absl:Waiting for previous save"  # Orbax's, on a machine that is busy
    assert [line for line in errors.splitlines() if not line.startswith(slow)] == []
    assert [line.split(". ")[0] for line in output.splitlines()] == [
        f"cannot write {tmp_path}/{keep}/2: File too large" for keep in (1, None)
    ]
    w = jnp.asarray(np.random.default_rng(1).random((10, 1000), np.float32))
    for keep in (1, None):
        with Checkpoints(tmp_path / str(keep)) as checkpoints:
            assert checkpoints.steps() == [1]
            params = {str(i): w + i for i in range(8)}
            assert_same_bits(checkpoints.restore_params(1, abstract(params)), params)


def test_restore_onto_another_mesh(tmp_path):
    """Saved on one device, restored in a process with four, the weight split over two of its axes."""
    state = make_state(step=7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, META)
    child = run_python(
        """
        import sys
        import jax
        jax.config.update("jax_num_cpu_devices", 4)
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from grpo_jax.run.checkpoint import Checkpoints
        from tests.test_checkpoint import abstract, assert_same_bits, make_state
        state = make_state(step=7)
        mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        def place(x):
            return NamedSharding(mesh, P("data", "fsdp") if x.shape == (8, 4) else P())
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)
        with Checkpoints(sys.argv[1]) as checkpoints:
            restored, meta = checkpoints.restore(7, target)
        assert_same_bits(restored, state)
        embedding = restored.params["embed"]["embedding"]
        assert embedding.sharding == place(embedding)
        assert [s.data.shape for s in embedding.addressable_shards] == [(4, 2)] * 4
        print(meta["threads"])
        """,
        tmp_path,
    )
    output, errors = child.communicate(timeout=90)
    assert (child.returncode, output) == (0, "2\n"), errors


def test_a_step_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(), {})
        with pytest.raises(ValueError, match=r"no checkpoint of step 3 in .*, which holds \[2\]"):
            checkpoints.restore(3, abstract(make_state()))


def truncate(folder):
    for file in (folder / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:8])


def empty(folder):
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_damaged_checkpoint_is_named_with_the_fix(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {})
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"cannot restore .*/2: it is damaged.* to continue from step 1"):
            checkpoints.restore(2, abstract(make_state()))
        assert int(checkpoints.restore(1, abstract(make_state()))[0].step) == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """Other widths and missing weights; Orbax itself can pad and truncate silently."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(width=4), {})
        wider = abstract(make_state(width=5))
        with pytest.raises(
            ValueError, match=r"/1 is of another model: embed/embedding has shape \(8, 4\) there"
        ):
            checkpoints.restore(1, wider)
        with pytest.raises(ValueError, match=r"norm/scale has shape \(4,\) there and None in this run"):
            checkpoints.restore_params(1, {k: v for k, v in make_state().params.items() if k != "norm"})


@pytest.mark.parametrize("optim", ["adafactor", "lion", "muon", "sgd"])
def test_the_moments_of_every_optimizer_come_back(optim, tmp_path):
    state = make_state()
    rule = make_rule(optim, 0.9, 0.99, 1e-8)
    tx = make_optimizer(rule, schedule=lambda count: 1e-3, weight_decay=0.1, max_grad_norm=1.0)
    gradient = in_float32(state.params)
    _, moments = tx.update(gradient, tx.init(gradient), gradient, learning_rate=1e-3)
    state = TrainState(step=state.step, params=state.params, opt_state=moments)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        assert_same_bits(checkpoints.restore(1, abstract(state))[0], state)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    state = make_state()
    sgd = TrainState(step=state.step, params=state.params, opt_state=optax.sgd(0.1, 0.9).init(state.params))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(
            ValueError, match=r"of another optimizer than this run's. Delete .* to start over"
        ):
            checkpoints.restore(1, abstract(sgd))


def test_meta_is_copied_when_saved_and_must_be_json(tmp_path):
    """The write is in the background: a counter that is still running must not leak into it."""
    meta = {"rewards": list(range(100_000))}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="float32 is not JSON"):
            checkpoints.save(1, make_state(), {"loss": np.float32(1)})
        assert checkpoints.steps() == []
        checkpoints.save(1, make_state(), meta)
        meta["rewards"].clear()
        assert len(checkpoints.restore(1, abstract(make_state()))[1]["rewards"]) == 100_000


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(
        ValueError, match=r"holds 'checkpoint-500', which is not a checkpoint .* another folder"
    ):
        Checkpoints(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"/file is a file"):
        Checkpoints(tmp_path / "file")


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"save_total_limit must be >= 1.* got 0"):
        Checkpoints(tmp_path, keep=0)


# Where a run starts


def fresh(updates=4, **changes):
    """The meta of a fresh start."""
    run = {
        "rows": {"number": 9, "order": "o", "content": "c", "tokens": "t"},
        "tools": {"tools.py": "x"},
        "rewards": {"strict": {"strict.py": "y"}},
        "numbers": {"seed": 1, "prompts": 2, "num_generations": 4, "num_iterations": 1, "updates": updates},
        "model": "/model",
        "options": {"beta": 0.0, "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0.0},
    } | changes
    meta = {
        "cursor": {"epoch": 0, "next_index": 0},
        "num_tokens": 0,
        "source": "/model",
        "param_dtype": "float32",
    }
    return meta | {"threads": 2, "xla_flags": "", "run": run}


def saved_run(folder, *steps, updates=4, **changes):
    """The checkpoints of a run, which read two rows an update."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in steps:
            cursor = {"cursor": {"epoch": 0, "next_index": 2 * step}, "num_tokens": 7}
            checkpoints.save(step, make_state(step), fresh(updates, **changes) | cursor)
    return folder / "checkpoints"


def start(folder, wanted=None, summary=None, updates=4, allow=False, **changes):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return find_start(checkpoints, wanted, summary or {}, fresh(updates, **changes), allow)


def test_a_run_starts_fresh_from_the_newest_or_from_a_named_step(tmp_path):
    assert start(tmp_path) == Start(None, fresh(), [])
    assert start(tmp_path, "none") == Start(None, fresh(), [])
    folder = saved_run(tmp_path, 1, 2)
    for wanted in (None, str(folder / "2")):
        found = start(tmp_path, wanted)
        assert (found.checkpoint, found.notes, found.finished) == ((folder, 2), [], None)
        assert (found.meta["cursor"]["next_index"], found.meta["num_tokens"]) == (4, 7)
    found = start(tmp_path / "other", str(folder / "1"))
    assert (found.checkpoint, found.meta["cursor"]["next_index"]) == ((folder, 1), 2)


def test_the_command_that_began_from_another_runs_step_continues(tmp_path):
    step = str(saved_run(tmp_path / "old", 1) / "1")
    first = start(tmp_path / "new", step)
    with Checkpoints(tmp_path / "new/checkpoints") as checkpoints:
        checkpoints.save(3, make_state(3), first.meta)
        checkpoints.wait()
    again = start(tmp_path / "new", step)
    assert again.checkpoint == (tmp_path / "new/checkpoints", 3) and again.meta["origin"] == step
    assert start(tmp_path / "new", step, {"after": {}, "updates": 4}).finished == 4
    other = str(saved_run(tmp_path / "third", 2) / "2")
    with pytest.raises(ValueError, match=r"cannot resume from .*/third/.*: .* already holds step 3"):
        start(tmp_path / "new", other)


def test_a_start_that_would_lose_what_is_saved_is_refused(tmp_path):
    folder = saved_run(tmp_path, 1, 2)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint is none, but .* holds checkpoints"):
        start(tmp_path, "none")
    with pytest.raises(ValueError, match=r"cannot resume from .*/1: .* already holds step 2"):
        start(tmp_path, str(folder / "1"))
    with pytest.raises(ValueError, match=r"must be a step's folder .*, got 3"):
        start(tmp_path, "3")


@pytest.mark.parametrize("after", [None, {}])
def test_a_finished_run_starts_only_for_more_updates(tmp_path, after):
    summary = {"after": after, "updates": 2}
    folder = saved_run(tmp_path, 2, updates=2)
    assert start(tmp_path, None, summary, 2).finished == 2
    assert start(tmp_path, None, summary, 1).finished == 2
    found = start(tmp_path, None, summary, 4)
    assert (found.checkpoint, found.finished) == ((folder, 2), None)
    assert found.notes == [
        f"Warning: not as when {folder / '2'} was saved: the run's number of updates: 2 then, 4 now"
    ]


def test_a_finished_run_names_what_differs_but_refuses_nothing(tmp_path):
    saved_run(tmp_path, 2, updates=2)
    found = start(tmp_path, None, {"after": {}, "updates": 2}, 2, tools={"tools.py": "z"})
    assert found.finished == 2
    assert "tools: the source of tools.py was changed" in found.notes[0]


def test_another_machine_is_said(tmp_path):
    folder = saved_run(tmp_path, 1)
    with Checkpoints(folder) as checkpoints:
        found = find_start(checkpoints, None, {}, fresh() | {"threads": 8}, False)
    assert found.meta["threads"] == 8
    (note,) = found.notes
    assert "threads was 2 when" in note and "is 8 now; sums are then computed in another order" in note


# Stopping


def test_sigterm_lets_the_step_end_and_the_state_be_saved(tmp_path):
    child = run_python(
        """
        import sys, time
        import jax.numpy as jnp
        from grpo_jax.run.checkpoint import Checkpoints
        from grpo_jax.run.stopping import StopSignal
        from grpo_jax.update.update import TrainState
        step = 0
        with Checkpoints(sys.argv[1]) as checkpoints, StopSignal() as stop:
            while not stop.requested:
                step += 1
                print("step", flush=True)
                time.sleep(0.05)
            checkpoints.save(step, TrainState(step=jnp.int32(step), params={"w": jnp.ones(2)}, opt_state=()), {})
        print("saved", step)
        """,
        tmp_path,
    )
    assert child.stdout.readline() == "step\n"
    child.send_signal(signal.SIGTERM)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    with Checkpoints(tmp_path) as checkpoints:
        assert output.endswith(f"saved {checkpoints.latest()}\n")


def test_the_second_ctrl_c_interrupts_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGTERM)  # a scheduler that asks again does not hurt the save
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_optimizer_is_refused_whatever_is_allowed(tmp_path):
    """Its checkpoints would be called damaged, and renamed one after the other."""
    options = {"beta": 0.0, "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0.0}
    saved_run(tmp_path, 1, 2, options=options | {"optim": "adamw_torch"})
    with pytest.raises(
        ValueError, match=r"it holds the moments of --optim adamw_torch, which lion_32bit cannot"
    ):
        start(tmp_path, allow=True, options=options | {"optim": "lion_32bit"})
    assert start(tmp_path, allow=True, options=options | {"optim": "adamw_torch"}).checkpoint is not None


@pytest.mark.parametrize("error", [PermissionError("no"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_what_may_be_whole_is_not_called_damaged(tmp_path, monkeypatch, error):
    saved_run(tmp_path, 1)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:

        def fails(*args, **kwargs):
            raise error

        monkeypatch.setattr(checkpoints._manager, "restore", fails)
        with pytest.raises(type(error), match=str(error)):
            checkpoints.meta(1)


def test_the_model_of_a_run_that_was_moved_is_found_where_the_run_is(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (new / "cold_start").mkdir(parents=True)
    meta = {"source": str(old / "cold_start")}
    assert source_of(meta, new) == new / "cold_start"
    assert source_of({"source": "gs://bucket/run/cold_start"}, new) == new / "cold_start"
    assert source_of({"source": str(old / "mine")}, new) == old / "mine"
    (old / "cold_start").mkdir(parents=True)
    assert source_of(meta, new) == old / "cold_start"
