"""The notebook runs from start to end, and stands in the repository with what it printed and drew."""

import sys

import launch
import nbformat
import pytest

PATH = launch.ROOT / "examples" / "bring_your_own_tools.ipynb"


def outputs(notebook):
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def test_it_shows_its_outputs_when_opened_on_a_code_host():
    shown = outputs(nbformat.read(PATH, as_version=4))
    assert not [out for out in shown if out.output_type == "error"]
    assert any("image/png" in out.get("data", {}) for out in shown)
    text = "".join(out.get("text", out.get("data", {}).get("text/plain", "")) for out in shown)
    assert "Check passed" in text and "Finished: " in text and "exact_answer_match" in text


@pytest.mark.slow
def test_it_runs_from_start_to_end(tmp_path, monkeypatch):
    """Learning the tools: of what is wrong after the cold start, at most half is wrong at the end."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(launch.ROOT))
    for name in ("XLA_FLAGS", "NPROC"):  # the tests' own: programs that compile faster train more slowly
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin", prepend=":")
    notebook = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(out.get("text", "") for out in outputs(notebook))
    (line,) = [line for line in shown.splitlines() if line.startswith("exact_answer_match  ")]
    before, after = (float(part) for part in line.removeprefix("exact_answer_match").split(" -> "))
    assert 1 - after <= (1 - before) / 2, line
