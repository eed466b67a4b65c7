"""A saved step as an HF folder: `python -m grpo_jax.export --checkpoint STEP --output_dir RUN`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax

from grpo_jax.files import OutputError
from grpo_jax.models import hf
from grpo_jax.models.peft import save_adapter
from grpo_jax.run.checkpoint import Checkpoints, is_step_folder
from grpo_jax.run.model_card import write_model_card
from grpo_jax.run.options import check_option
from grpo_jax.run.weights import restore_adapters, restore_weights, source_of


def export(saved: Path, step: str, folder: Path | None, max_shard_size: str, adapter: bool = False) -> Path:
    """Write one checkpoint's weights with its source's config and tokenizer; adapters are merged.

    Args:
        saved: the folder of a run's checkpoints, in its output_dir.
        step: a step number, or "latest".
        folder: where to; None for `RUN/export/step_N`, or `step_N_adapter`.
        adapter: write the adapters alone, as a PEFT folder.

    Returns:
        The folder.

    Raises:
        ValueError: no such checkpoint (names those that are there), or no adapters in it.
    """
    run = saved.parent
    with Checkpoints(saved) as checkpoints:
        number = checkpoints.latest() if step == "latest" else int(step)
        if number is None:
            raise ValueError(
                f"{checkpoints.directory} holds no checkpoints; name a run's folder with --output_dir"
            )
        meta = checkpoints.meta(number)
        folder = folder or run / "export" / f"step_{number}{'_adapter' if adapter else ''}"
        if adapter:
            weights, config = restore_adapters(checkpoints, number, _on_one_device)
            save_adapter(folder, weights, config, meta["base"]["name"])
        else:
            source = source_of(meta, run)
            params = restore_weights(checkpoints, number, _on_one_device, meta.get("param_dtype", "float32"))
            hf.save_model(folder, params, hf.read_config(source), source, max_shard_size)
            write_model_card(folder, run, number)
    return folder


def _on_one_device(tree):
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    description = "Write a checkpoint as a Hugging Face folder."
    parser = argparse.ArgumentParser(prog="python -m grpo_jax.export", description=description)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="STEP", help="Step number, latest, or a step's folder.")
    add("--output_dir", metavar="RUN", help="The run's folder; not needed with a step's folder.")
    add(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="Folder to write. [default: RUN/export/step_N, or step_N_adapter]",
    )
    add(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="Maximum size of one weight file. [default: 5GB]",
    )
    add("--adapter", action="store_true", help="Write the LoRA adapters alone, for PEFT.")
    args = parser.parse_args(argv)
    try:
        check_option("max_shard_size", args.max_shard_size)
        run, step = args.output_dir, args.checkpoint
        if is_step_folder(step):
            saved, step = Path(step).absolute().parent, Path(step).name
            if run is not None and Path(run).absolute() != saved.parent:
                raise ValueError(
                    f"--output_dir is the run that a step number is of, got {run} with {args.checkpoint}; "
                    "--to names the folder to write"
                )
        elif run is None or not (step == "latest" or step.isdigit()):
            raise ValueError(
                f"--checkpoint must be a step number or latest together with --output_dir RUN, or a step's "
                f"folder (RUN/checkpoints/STEP), got {step!r}"
            )
        else:
            saved = Path(run) / "checkpoints"
        print(f"Written: {export(saved, step, args.to, args.max_shard_size, args.adapter)}")
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
