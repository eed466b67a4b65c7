"""report.html: what is in it, that it needs nothing else, and that no text of a run becomes markup."""

import html.parser
import json
import shutil
import subprocess

import pytest

from grpo_jax.report import main
from grpo_jax.run.config import write_resolved
from grpo_jax.run.options import GRPOConfig
from grpo_jax.run.report import read_run, write_report
from grpo_jax.scoring.evaluation import FIGURES

EVIL = '<script>alert("&amp;")</script>\u2028\x85end'  # separators that end no line of JSONL


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; unbalanced tags fail."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self._open = [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")
        ]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag != "meta":
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def shown(page):
    """A page as a browser has it after its scripts ran."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_runs_no_script_of_a_tool(tmp_path):
    """The same script as an element changes the title: this browser would run it."""
    script = "<script>document.title = 'it ' + 'ran'</script>"
    control = tmp_path / "control.html"
    control.write_text(f"<!doctype html><html><body>{script}</body></html>")
    assert "<title>it ran</title>" in shown(control)
    leave_a_run(tmp_path / "run")
    for path in (tmp_path / "run/rollouts").iterdir():
        path.write_text(path.read_text().replace("Sum: 3", script))
    page = shown(write_report(tmp_path / "run"))
    assert "<title>run: 12 updates</title>" in page and "it ran" not in page
    assert html.escape(script, quote=False) in page


def evaluation(share):
    figures = {"response_validity": 1.0, "exact_answer_match": share, "tool_call_schema_match": None}
    figures |= {"turn_closed": 1.0}  # and no answer_grounded: a run from before there was that figure
    intervals = {name: (max(0, (v or 0) - 0.1), min(1, (v or 0) + 0.1)) for name, v in figures.items()}
    return {**figures, "n": 50, "intervals": intervals}


def leave_a_run(folder, steps=12):
    """What a run of two rewards leaves, with hostile text in its conversations."""
    (folder / "rollouts").mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        values = {"reward": step / steps, "entropy": None, "grad_norm": 1.0, "status/answered": 0.5}
        values |= {"status/overlong": 0.0, "rewards/a/mean": 0.1, "rewards/b/mean": 0.2}
        lines.append(json.dumps({"step": step, **values}))
        rows = [
            {
                "prompt": f"row {i} {EVIL}",
                "messages": [
                    {
                        "role": "assistant",
                        "reasoning_content": "one and two",
                        "content": EVIL,
                        "tool_calls": [{"function": {"name": "add"}}],
                    },
                    {"role": "tool", "name": "add", "content": "Sum: 3"},
                ],
                "answer": EVIL,
                "rewards": {"a": i, "b": None},
                "status": "answered",
                "advantage": float(i),
                "why": f"because {i}",
            }
            for i in (2, 0, 1, 3)
        ]
        path = folder / "rollouts" / f"step_{step:06d}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13, "rew')  # torn by a kill
    summary = {
        "before": evaluation(0.25),
        "after": evaluation(0.75),
        "timings": {"update": 61.0, "save": 0.01},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    write_resolved(GRPOConfig(learning_rate=5e-4, system_prompt=EVIL), folder / "resolved_config.yaml")


def test_the_page_shows_the_run_and_needs_nothing_else(tmp_path):
    folder = tmp_path / "a <b> run"
    leave_a_run(folder)
    text = write_report(folder).read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "b"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)  # within a picture
    assert "@import" not in text and "url(http" not in text
    assert page.tags.count("svg") == 3  # evaluation, curves, time
    words = page.text
    assert "a <b> run: 12 updates" in words
    for shown in ("0.25", "0.75", "0.250 (0.150 to 0.350)", "0.750 (0.650 to 0.850)", "–", "50", "61 s"):
        assert shown in words
    for panel in ("gradient norm", "how completions ended, share", "rewards", "reward", "before", "after"):
        assert panel in words
    assert "entropy, nats" in words and "KL to the reference, nats" not in words
    assert "overlong" not in words  # never happened
    assert "2 options that are not the defaults" in words and "0.0005" in words
    assert [word for word in words if word.startswith("Update ")] == ["Update 1", "Update 7", "Update 12"]
    # lowest, middle and highest reward of three updates
    for i, times in ((0, 3), (1, 0), (2, 3), (3, 3)):
        assert words.count(f"row {i} {EVIL}") == times
        assert words.count(f"because {i}") == times
        assert words.count(f"a {i}, b –: row {i} {EVIL}"[: len(f"a {i}, b –: ") + 100]) == times
    assert f'one and two\n{EVIL}\n{{"name": "add"}}' in words


def test_figures_that_could_not_be_computed_are_dashes(tmp_path):
    """An evaluation on rows whose answers are all errors."""
    nothing = dict.fromkeys(FIGURES)
    summary = {"before": {**nothing, "n": 0, "intervals": nothing}, "after": {**evaluation(0.5)}}
    summary["after"]["intervals"]["exact_answer_match"] = None
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    words = Page(write_report(tmp_path).read_text()).text
    assert words.count("–") == 7 and "0.500 (–)" in words


@pytest.mark.parametrize("missing", ["summary.json", "resolved_config.yaml", "rollouts"])
def test_a_run_that_has_just_begun(missing, tmp_path):
    leave_a_run(tmp_path / "run")
    path = tmp_path / "run" / missing
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    else:
        path.unlink()
    words = Page(write_report(tmp_path / "run").read_text()).text
    shown = {
        "summary.json": "Evaluation" in words and "Time" in words,
        "resolved_config.yaml": "2 options that are not the defaults" in words,
        "rollouts": "Update 1" in words and "No rollouts yet." not in words,
    }
    assert shown == {name: name != missing for name in shown}
    assert "run: 12 updates" in words and "gradient norm" in words


def test_a_run_without_an_update(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_run(tmp_path) == ([], {})
    page = Page(write_report(tmp_path).read_text())
    assert "No rollouts yet." in page.text


def test_the_command_writes_it_and_names_what_is_missing(tmp_path, capsys):
    leave_a_run(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    (tmp_path / "run/report.html").unlink()
    (tmp_path / "run/report.html").mkdir()
    assert main([str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith(
        f"Error: cannot write {tmp_path / 'run/report.html'}: Is a directory"
    )
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == (
        f"Error: {tmp_path} holds no metrics.jsonl; name the output_dir of a run"
    )
