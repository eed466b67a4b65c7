"""report.html of a run, finished or still running: `python -m grpo_jax.report runs/quickstart`."""

from __future__ import annotations

import argparse
import sys

from grpo_jax.files import OutputError
from grpo_jax.run.report import write_report


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    description = "Write a run's curves and conversations to report.html."
    parser = argparse.ArgumentParser(prog="python -m grpo_jax.report", description=description)
    parser.add_argument("run", metavar="RUN", help="Folder of a run, its output_dir.")
    try:
        print(write_report(parser.parse_args(argv).run))
    except FileNotFoundError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
