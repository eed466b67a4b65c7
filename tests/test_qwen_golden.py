"""The cases of `test_qwen_torch.py` without torch, against files made by scripts/make_golden.py."""

from pathlib import Path

import numpy as np
import pytest
from parity import CASES, assert_parity, ours, thinned, write_checkpoint

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", CASES)
def test_parity_with_golden_files(case, tmp_path):
    want = dict(np.load(GOLDEN / f"{case}.npz"))
    folder = write_checkpoint(tmp_path, CASES[case])
    assert_parity(thinned(ours(folder, want["greedy"])), want)


def test_golden_files_are_small_and_complete():
    assert {path.stem for path in GOLDEN.iterdir()} == CASES.keys()
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 300_000
