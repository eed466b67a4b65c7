"""The kill test: a few of the kills of scripts/kill_test.py, which is run by hand with 25."""

import os
import subprocess
import sys

import launch
import pytest


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_as_one_that_was_not(tmp_path):
    """In phases that the seed draws: the start, the cold start, and a rollout."""
    ran = subprocess.run(
        [sys.executable, "scripts/kill_test.py", "--kills", "2", "--updates", "6", "--output_dir", tmp_path,
         "--compilation_cache_dir", launch.XLA_CACHE],
        cwd=launch.ROOT, env=os.environ | launch.ENVIRONMENT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    print(ran.stdout)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "2 of 2 kills: 1 runs equal to the whole one" in ran.stdout
