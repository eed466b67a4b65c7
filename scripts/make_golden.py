"""Write tests/golden/*.npz: results of the published models' own code, for machines without torch.

pip install -e ".[test,torch]" && python scripts/make_golden.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from parity import CASES, thinned, write_checkpoint  # noqa: E402
from torch_reference import reference  # noqa: E402


def main() -> None:
    """One file per case of `parity.CASES`."""
    (TESTS / "golden").mkdir(exist_ok=True)
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            results = thinned(reference(write_checkpoint(Path(folder), config)))
        np.savez_compressed(TESTS / "golden" / f"{name}.npz", **results)


if __name__ == "__main__":
    main()
