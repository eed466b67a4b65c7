"""The pages of docs/: their generated parts are those of the code, and their links lead somewhere."""

import importlib.util
import re

import launch
import pytest

from grpo_jax.scoring.metrics import METRICS

ROOT = launch.ROOT
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["options.md", "metrics.md", "trl.md"])
def test_generated_parts_are_those_of_the_code(name):
    assert (ROOT / "docs" / name).read_text() == make_docs().rendered(name), "run python scripts/make_docs.py"


def test_the_table_holds_every_metric_of_a_run_and_no_other():
    """Those that the smoke run does not write are in the source under their name."""
    written = {key for line in launch.smoke().jsonl("metrics.jsonl") for key in line}
    patterns = {
        name: re.sub("NAME|STATUS|FIGURE", r"[^/]+", re.escape(name).replace("\\-", "-")) for name in METRICS
    }
    unknown = {k for k in written if not any(re.fullmatch(p, k) for p in patterns.values())}
    assert not unknown
    source = "".join(path.read_text() for path in (ROOT / "grpo_jax").rglob("*.py") if path.stem != "metrics")
    for name, pattern in patterns.items():
        if not any(re.fullmatch(pattern, key) for key in written):
            assert f'"{name}"' in source or f'"{name.replace("FIGURE", "{k}")}"' in source, name


def anchors(text):
    """GitHub's anchors of the headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {
        "README.md",
        *re.findall(r"\]\((\w+\.md)\)", index),
    }
