"""Runs whose output_dir is a URL: the store holds what was reported as saved, whenever the run or the store dies."""

import json
import shutil
from pathlib import Path

import fsspec
import launch
import pytest

from grpo_jax.files import OutputError
from grpo_jax.run.remote import Remote, open_remote


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Local folders of runs; removing it is losing the machine."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder
    fsspec.filesystem("memory").store.clear()


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def published():
    """A run with a checkpoint, and what it holds."""
    remote = Remote("memory://bucket/mine")
    remote.fetch()
    write(remote.folder, checkpoints__1__a="one", checkpoints__1__b="two", metrics="1\n", summary="{}")
    (remote.folder / "summary").rename(remote.folder / "summary.json")
    remote.publish()
    return remote, files(remote.folder)


def test_a_lost_folder_comes_back(published, cache):
    remote, held = published
    write(remote.folder, **{"model.tmp__weights": "half", "checkpoints__2.orbax-checkpoint-tmp__a": "half"})
    remote.publish()
    shutil.rmtree(cache)
    other = Remote("memory://bucket/mine/")
    assert "were fetched" in other.fetch()
    assert files(other.folder) == held


def test_what_was_not_published_is_made_again(published):
    remote, held = published
    write(remote.folder, checkpoints__2__a="later", metrics="1\n2\n")
    other = Remote("memory://bucket/mine")
    other.fetch()
    assert files(other.folder) == held and not (other.folder / "checkpoints/2").exists()


class Dies(Exception):
    pass


@pytest.mark.parametrize("writes", range(1, 9))
def test_a_publication_that_dies_anywhere_leaves_whole_folders(published, cache, monkeypatch, writes):
    """After each write to the store in turn. The model is replaced, a checkpoint is added and one removed."""
    remote, _ = published
    write(remote.folder, model__a="old", model__b="old")
    remote.publish()
    shutil.rmtree(remote.folder / "checkpoints/1")
    write(
        remote.folder,
        model__a="new",
        model__b="new",
        checkpoints__2__a="1",
        checkpoints__2__b="2",
        metrics="1\n2\n",
    )
    left = writes

    def dying(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Dies("no more")
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("_upload", "_write_manifest"):
            patched.setattr(remote, name, dying(getattr(remote, name)))
        if writes < 8:  # two manifests, five files, the summary
            with pytest.raises(OutputError, match="cannot write memory://bucket/mine: no more"):
                remote.publish()
        else:
            remote.publish()
    shutil.rmtree(cache)
    other = Remote("memory://bucket/mine")
    other.fetch()
    got = files(other.folder)
    assert [got.get(f"model/{name}") for name in "ab"] in ([None] * 2, ["old"] * 2, ["new"] * 2)
    assert [got.get(f"checkpoints/2/{name}") for name in "ab"] in ([None] * 2, ["1", "2"])
    assert got["metrics"] in ("1\n", "1\n2\n") and got["summary.json"] == "{}"
    if writes == 8:
        assert got.keys() == {
            "model/a",
            "model/b",
            "checkpoints/2/a",
            "checkpoints/2/b",
            "metrics",
            "summary.json",
        }
    remote.publish()  # the next save tries again
    other.fetch()
    assert files(other.folder) == files(remote.folder)


def test_a_folder_that_is_not_as_it_was_published_is_left_out(published, cache, caplog):
    fsspec.filesystem("memory").pipe_file("/bucket/mine/checkpoints/1/b", b"tow")
    shutil.rmtree(cache)
    other = Remote("memory://bucket/mine")
    other.fetch()
    assert files(other.folder).keys() == {"metrics", "summary.json"}
    assert "memory://bucket/mine/checkpoints/1 is not as it was published and is left out" in caplog.text


def test_a_run_that_starts_over_empties_the_store(published):
    other = Remote("memory://bucket/mine")
    other.fetch(empty=True)
    assert not files(other.folder)
    write(other.folder, metrics="1\n")
    other.publish()
    store = fsspec.filesystem("memory")
    assert sorted(store.find("/bucket/mine")) == ["/bucket/mine/metrics", "/bucket/mine/published.json"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://bucket/x", "output_dir nowhere://bucket/x cannot be opened: Protocol not known: nowhere"),
        ("gs://bucket/x", "output_dir gs://bucket/x cannot be opened: Please install gcsfs"),
    ],
)
def test_a_store_that_cannot_be_opened_is_an_error(url, message):
    with pytest.raises(ValueError, match=message):
        Remote(url)


def test_mlflow_needs_a_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(
        ValueError, match="report_to mlflow needs MLFLOW_TRACKING_URI when output_dir is a URL"
    ):
        open_remote("memory://bucket/x", "mlflow")


def test_only_training_takes_a_url(capsys):
    from grpo_jax import sft

    status = sft.main([*launch.options(launch.FOLDER / "unused"), "--output_dir", "memory://bucket/x"])
    assert status == 2 and "output_dir may be a URL in grpo_jax.train only" in capsys.readouterr().err


def test_a_run_that_lost_its_machine_continues_bit_for_bit(cache):
    """Stopped after update 2 by its reward; then its local folder is gone."""
    url = "memory://bucket/run"
    once = launch.FOLDER / "remote_stops"
    reward = launch.write(
        launch.FOLDER / "stopping" / "spread.py",
        "import os, signal\nfrom pathlib import Path\n\n\n"
        "def reward_func(completions, completion_ids, trainer_state, **kwargs):\n"
        f"    once = Path({str(once)!r})\n"
        "    if trainer_state['global_step'] == 1 and not once.exists():\n"
        "        once.touch()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    return {launch.SPREAD_VALUE}\n",
    )

    def run():
        return launch.small_run(launch.FOLDER / "remote", "--output_dir", url, reward_fn=reward)

    stopped = run()
    assert stopped.status == 130 and "Stopped after update 2, which is saved." in stopped.out
    shutil.rmtree(cache)
    ran = run()
    assert ran.status == 0, ran.err
    assert "Continuing from the checkpoint of update 2" in ran.out
    assert f"the model is in {url}/model" in ran.out
    store, whole = fsspec.filesystem("memory"), launch.whole()
    assert store.cat_file("/bucket/run/model/model.safetensors") == whole.weights()
    got = [json.loads(line) for line in store.cat_file("/bucket/run/metrics.jsonl").decode().splitlines()]
    for mine, other in zip(got, whole.jsonl("metrics.jsonl"), strict=True):
        assert {k: v for k, v in mine.items() if k != "step_time"} == {
            k: v for k, v in other.items() if k != "step_time"
        }
    held = {name.split("/")[3] for name in store.find("/bucket/run")}
    assert held >= {
        "checkpoints",
        "rollouts",
        "summary.json",
        "report.html",
        "resolved_config.yaml",
        "published.json",
    }
    assert "output_dir: memory://bucket/run" in store.cat_file("/bucket/run/resolved_config.yaml").decode()
    assert "is finished after 4 updates" in run().out


@pytest.mark.slow
def test_an_s3_server_holds_what_was_saved(tmp_path, cache, monkeypatch):
    """Against moto's server, over HTTP."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    pytest.importorskip("s3fs")
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        remote = Remote("s3://bucket/runs/mine")
        remote.fetch()
        write(remote.folder, checkpoints__1__d__a="one", checkpoints__1__b="two", metrics="1\n")
        (remote.folder / "large").write_bytes(bytes(60 << 20))  # in several parts
        remote.publish()
        shutil.rmtree(remote.folder / "checkpoints/1")
        write(remote.folder, checkpoints__2__a="three")
        remote.publish()
        held = files(remote.folder)
        shutil.rmtree(cache)
        fsspec.filesystem("s3").invalidate_cache()
        other = Remote("s3://bucket/runs/mine")
        other.fetch()
        assert files(other.folder) == held
        assert sorted(fsspec.filesystem("s3").find("bucket/runs/mine/checkpoints")) == [
            "bucket/runs/mine/checkpoints/2/a"
        ]
    finally:
        server.stop()
