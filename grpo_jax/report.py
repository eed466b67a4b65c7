"""report.html of a run, finished or still running: `python -m grpo_jax.report runs/quickstart`."""

from __future__ import annotations

import argparse
import sys

from grpo_jax.run.report import write_report


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m grpo_jax.report", description="Draw a run: report.html.")
    parser.add_argument("run", help="output_dir of a run")
    try:
        print(write_report(parser.parse_args(argv).run))
    except FileNotFoundError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
