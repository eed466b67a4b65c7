"""What decides a run's result: kept in its checkpoints, and compared by the run that continues one."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import marshal
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.models.lora import LoraConfig
from grpo_jax.scoring.rewards import RewardFunction
from grpo_jax.text import shorten
from grpo_jax.tools import Toolbox
from grpo_jax.types import Prompt

Identity = dict[str, Any]  # JSON, from `run_identity`

# Options that are compared by their effect, or that do not change what is learned.
NOT_COMPARED = frozenset((
    "tools_script", "tool_functions_module", "reward_fn", "reward_function_name",  # by their source
    "dataset_id_or_path", "dataset_columns", "system_prompt", "max_prompt_length", "overlong_prompts",  # by the rows
    "model_name_or_path", "model_revision", "tokenizer_name_or_path", "chat_template",  # by the model's folder and the prompts' tokens
    "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations",
    "num_train_epochs", "max_steps",  # by the number of updates
    "use_peft", "lora_r", "lora_alpha", "lora_target_modules",  # by the adapters' shapes
    "tool_sandbox", "cold_start", "sft_max_steps", "sft_batch_size", "sft_learning_rate", "sft_eval_steps", "sft_validation_size",
    "sft_stop_match", "sft_stop_reward", "sft_stop_grounded", "sft_weights",
    "mesh_data", "mesh_fsdp", "mesh_tensor", "micro_batches", "gradient_checkpointing", "max_shard_size",
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_config_change",
    "save_strategy", "save_steps", "save_total_limit", "logging_steps", "log_completions", "log_level", "report_to",
    "eval_dataset_id_or_path", "eval_steps", "eval_strategy", "generation_batch_size", "eval_batch_size", "eval_samples", "verify_purity",
    "early_stop_metric", "load_best_model_at_end", "check", "plan", "print_config", "compilation_cache_dir",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Difference:
    """Something in which a run differs from the checkpoint that it continues.

    Args:
        refused: it would silently change the result.
    """

    text: str
    refused: bool


def run_identity(
    prompts: Sequence[Prompt],
    toolbox: Toolbox,
    rewards: Sequence[RewardFunction],
    numbers: Mapping[str, int],
    model: str,
    options: Mapping[str, Any],
) -> Identity:
    """What decides a run's result, as JSON: digests of rows and sources, the batch, the options.

    Args:
        prompts: the training data, in its order.
        numbers: `seed`, `prompts` and `num_generations` of an update, `num_iterations`, `updates` of the run.
    """

    def of_object(value: Any) -> str:  # of a hub data set, which holds more than JSON's types
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))

    examples = [p.example for p in prompts]  # without the place that each was read from
    rows = [_digest(json.dumps([e.messages, e.answer, e.extra], default=of_object)) for e in examples]
    if toolbox.script is not None:
        file = Path(toolbox.script)
    else:
        spec = importlib.util.find_spec(toolbox.module) if toolbox.module else None
        file = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
    sources = {}
    for reward in rewards:
        path = Path(reward.source).expanduser()
        if reward.source == "built-in":
            sources[reward.name] = {reward.name: "built-in"}
        else:
            sources[reward.name] = source_digests(path if path.is_file() else None, [reward.function])
    return {
        "rows": {
            "number": len(rows),
            "order": _digest("".join(rows)),
            "content": _digest("".join(sorted(rows))),
            # the text that JSON has for them, of millions of ids in half the time
            "tokens": _digest(repr([p.ids for p in prompts])),
        },
        "tools": source_digests(file, toolbox.functions.values()),
        "rewards": sources,
        "numbers": dict(numbers),
        "model": model,
        "options": {name: value for name, value in options.items() if name not in NOT_COMPARED},
    }


def differences(then: Identity, now: Identity) -> list[Difference]:
    """The differences between a run and the checkpoint that it continues; refused ones first."""
    refused = _row_differences(then["rows"], now["rows"])
    refused += _source_differences("tools", then["tools"], now["tools"])
    old, new = then["rewards"], now["rewards"]
    if [*old] != [*new]:
        refused.append(_was("the rewards", ", ".join(old), ", ".join(new)))
    for name in old.keys() & new.keys():
        refused += _source_differences(f"reward {name}", old[name], new[name])
    for name, value in then["numbers"].items():
        if name != "updates" and value != now["numbers"][name]:
            title = "prompts per update" if name == "prompts" else name
            refused.append(_was(title, value, now["numbers"][name]))
    found = [Difference(text, True) for text in refused]
    options = {name: (value, now["options"].get(name)) for name, value in then["options"].items()}
    # weights come with the checkpoint, but the reference of the KL is loaded from the model
    if then["model"] != now["model"] and os.path.exists(then["model"]):
        found.append(Difference(_was("the model", then["model"], now["model"]), bool(now["options"]["beta"])))
    # another optimizer cannot continue from the moments of this one
    found += [Difference(_was(name, a, b), name == "optim") for name, (a, b) in options.items() if a != b]
    updates = then["numbers"]["updates"], now["numbers"]["updates"]
    if updates[0] != updates[1]:
        text = _was("the run's number of updates", *updates)
        schedule, warmup = now["options"]["lr_scheduler_type"], now["options"]["warmup_steps"]
        warms = schedule != "constant" and 0 < warmup < 1  # for a share of the run
        if warms or schedule not in ("constant", "constant_with_warmup", "inverse_sqrt"):
            text += f"; the {schedule} schedule of the learning rate now ends there, so its next values jump to the new curve"
        found.append(Difference(text, False))
    return sorted(found, key=lambda one: not one.refused)


def _was(name: str, then: Any, now: Any) -> str:
    return f"{name}: {shorten(str(then), 100)} then, {shorten(str(now), 100)} now"


def _row_differences(then: Identity, now: Identity) -> list[str]:
    if then["number"] != now["number"]:
        return [_was("the training data", f"{then['number']} rows", f"{now['number']} rows")]
    if then["content"] != now["content"]:
        return [f"the training data: {now['number']} rows as before, but with other contents"]
    if then["order"] != now["order"]:
        return ["the training data: the same rows in another order"]
    if then["tokens"] != now["tokens"]:
        return [
            "the prompts' tokens: the same rows, but another tokenizer, chat template or tool schemas, or other "
            "chat_template_kwargs"
        ]
    return []


def _source_differences(of: str, then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [name for name in then if name in now and then[name] != now[name]]
    texts = [f"{of}: the source of {name} was changed" for name in changed]
    gone, new = ([n for n in a if n not in b] for a, b in ((then, now), (now, then)))
    if gone or new:
        texts.append(_was(f"{of}, by source", ", ".join(gone) or "none", ", ".join(new) or "none"))
    return texts


# Adapters


def adapters_meta(config: LoraConfig, name: str, dtype: Any) -> dict[str, Any]:
    """What the checkpoints of a run with adapters say of them.

    Args:
        name: hub id or folder of the base.
    """
    # lists, as they come back from JSON
    fields = dataclasses.asdict(config) | {"modules": list(config.modules)}
    return {"lora": fields, "base": {"name": name, "dtype": str(dtype)}}


def check_adapters(saved: Mapping[str, Any], meta: Mapping[str, Any], where: Path) -> None:
    """Whether a run continues a checkpoint with the same adapters on the same base, or both without.

    Args:
        saved: the checkpoint's meta.
        meta: the one that this run would save.

    Raises:
        ValueError: names the setting that differs, and both values.
    """
    # dropout may change, as a learning rate may
    for name, option in (("rank", "r"), ("alpha", "alpha"), ("modules", "target_modules")):
        then, now = (one.get("lora", {}).get(name) for one in (saved, meta))
        if then != now:
            raise ValueError(
                f"cannot resume from {where}: lora_{option} was {then} there and is {now} in this run (None: "
                "without use_peft). Use the same, or choose another --output_dir"
            )
    # a path does not show whether a base was moved or is another one
    if "lora" in saved and saved["source"] != meta["source"] and Path(saved["source"]).exists():
        raise ValueError(
            f"cannot resume from {where}: its adapters were trained on {saved['source']}, this run's model "
            f"is {meta['source']}. Use the same, or choose another --output_dir"
        )


# Digests


def _digest(text: str | bytes) -> str:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()[:16]


def source_digests(file: Path | None, functions: Iterable[Callable]) -> dict[str, str]:
    """Digests of the source behind functions, without comments and layout.

    Args:
        file: where they were loaded from; digested with the modules next to it that it imports, and those
            that these import. Data files that the code reads are not. None: the functions' own source alone.

    Returns:
        Path relative to the file's folder, or the function's name → digest.
    """
    if file is None:
        return {f.__name__ if hasattr(f, "__name__") else repr(type(f)): _code_digest(f) for f in functions}
    file = file.resolve()
    found, open_files = {file}, [file]
    while open_files:
        new = set(_imported_files(open_files.pop(), file)) - found
        found |= new
        open_files += new
    texts = {os.path.relpath(path, file.parent): path.read_bytes() for path in sorted(found)}
    return {name: _digest(_code(text)) for name, text in texts.items()}


def _imported_files(path: Path, main: Path) -> Iterator[Path]:
    """The files of the import statements in `path` that lie in the folder, or in the package, of `main`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = main.parent
    while (package / "__init__.py").exists():
        package = package.parent
    own = main.relative_to(package).parts[0]  # top-level name: the file's own, or that of its package
    installed = "site-packages" in package.parts or "dist-packages" in package.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names, root = [alias.name for alias in node.names], package
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
            root = path.parents[node.level - 1] if node.level else package
        else:
            continue
        for name in names:
            parts = name.split(".")
            if installed and root == package and parts[0] != own:
                continue  # every other library lies there too
            for n in range(1, len(parts) + 1):
                place = root.joinpath(*parts[:n])
                yield from (p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file())


def _code(source: str | bytes) -> str | bytes:
    """Python source without comments and layout; as it is where it does not parse."""
    try:
        return ast.unparse(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError):
        return source


def _code_digest(function: Any) -> str:
    function = inspect.unwrap(getattr(function, "func", function))  # of a functools.partial
    if not inspect.isroutine(function):
        function = type(function)  # an object that can be called
    try:
        return _digest(_code(textwrap.dedent(inspect.getsource(function))))
    except (OSError, TypeError):  # typed at a prompt, or made by exec
        code = getattr(function, "__code__", None)
        return _digest(repr(function) if code is None else marshal.dumps(code.replace(co_filename="")))
