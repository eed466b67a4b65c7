"""Options from a YAML file and from flags, which override it; and back into a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo_jax.files import write_text_atomic
from grpo_jax.run.fields import GROUPS, OPTIONS, option_type
from grpo_jax.run.options import GRPOConfig, resolve
from grpo_jax.run.trl_options import ALIASES, Entry

# Where a flag sets one of these, the default job's file does not apply: its other values are for its own data.
OWN_JOB = ("tools_script", "tool_functions_module", "reward_fn", "reward_function_name", "dataset_id_or_path")


@dataclasses.dataclass(frozen=True)
class ResolvedConfig:
    """A config and where each value came from.

    Args:
        origin: option -> "file:line", "--flag" or "default".
        path: the YAML file, None without one.
    """

    config: GRPOConfig
    origin: dict[str, str]
    path: str | None

    def by_flag(self, option: str) -> bool:
        """Whether a flag gave the value."""
        return self.origin[option].startswith("--")

    def sources(self) -> str:
        """Where the values came from, in one line."""
        flags = sum(map(self.by_flag, self.origin))
        parts = [self.path] if self.path else []
        parts += [f"{flags} flag{'s' if flags > 1 else ''}"] if flags else []
        return f"Options: {', '.join([*parts, 'defaults otherwise'])}" if parts else "Options: all defaults"


def parse_config(
    argv: Sequence[str], *, prog: str, default_config: str | None = None, description: str = ""
) -> ResolvedConfig:
    """The options of a command: defaults, then the YAML file, then flags.

    Args:
        default_config: YAML file that applies without --config and without flags of OWN_JOB.

    Raises:
        ValueError: for a missing or unreadable file, and for all options that are unknown (with the nearest
            name), wrong or not supported; says where each stands.
        SystemExit: after --help.
    """
    if {"-h", "--help"} & set(argv):
        _help_parser(prog, description, default_config).print_help()
        raise SystemExit(0)
    flags, path, problems = _read_flags(argv)
    if path is None and not any(ALIASES.get(name, name) in OWN_JOB for name, _, _ in flags):
        path = default_config
    file = [(name, value, f"{path}:{line}: ") for name, value, line in read_yaml(path)] if path else []
    values, where = resolve([file, flags], problems, rewards=["accuracy"])
    origin = {name: where[name].removesuffix(": ") if name in where else "default" for name in OPTIONS}
    return ResolvedConfig(GRPOConfig(**values), origin, path)


def read_yaml(path: str) -> list[tuple[str, Any, int]]:
    """The top-level entries of a YAML file: (key, value, line).

    Raises:
        ValueError: when the file is missing, is not YAML, or is not a mapping of options.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot read the config file {path}: {why}; name another with --config FILE"
        ) from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}:1: a config file must hold `option: value` lines")
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    return [(key.value, values.get(key.value), key.start_mark.line + 1) for key, _ in root.value]


def _read_flags(argv: Sequence[str]) -> tuple[list[Entry], str | None, list[str]]:
    """The flags as entries, the file of --config, and what is wrong with the words themselves."""
    words: dict[str, list[str]] = {}
    problems, current = [], None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = [value] if equals else []
            words[name.replace("-", "_")] = current  # the last of equal flags counts
        elif current is None:
            problems.append(f"{word!r} belongs to no option; write --option value")
        else:
            current.append(word)
    entries, path = [], None
    for name, given in words.items():
        option = ALIASES.get(name, name)
        holds = option_type(option) if option in OPTIONS else None
        if len(given) > 1 and (option == "config" or (holds and not holds.is_list)):
            problems.append(f"{given[1]!r} belongs to no option; write --option value")
        elif not given and (option == "config" or (holds and holds.kind is not bool)):
            problems.append(f"--{name} needs a value")
        elif option == "config":
            path = given[0]
        else:
            entries.append((name, _flag_value(option, given), f"--{name}: "))
    return entries, path, problems


def _flag_value(option: str, words: list[str]) -> Any:
    """The value that some words give: text for an option, and for other names what YAML would read."""
    if option in OPTIONS:
        return words if option_type(option).is_list else words[0] if words else "true"
    if len(words) != 1:
        return words or True
    try:
        return yaml.safe_load(words[0])
    except yaml.YAMLError:
        return words[0]


def _help_parser(prog: str, description: str, default_config: str | None) -> argparse.ArgumentParser:
    """A parser that only prints the help: argparse ends at the first mistake, `resolve` reports all."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, usage="%(prog)s [--config FILE] [--option value ...]"
    )
    default = f"{default_config}, unless flags give tools, rewards or data" if default_config else "none"
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of options [default: {default}]")
    group: Any = parser
    for name, field in OPTIONS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        kind, choices, is_list, _ = option_type(name)
        words = "|".join(choices) or {bool: "true|false", dict: "JSON"}.get(kind, kind.__name__.upper())
        names = [f"--{name}", *(f"--{alias}" for alias, target in ALIASES.items() if target == name)]
        text = f"{field.description} [default: {shown(field.get_default(call_default_factory=True))}]"
        nargs = "+" if is_list else "?" if kind is bool else None
        group.add_argument(*names, metavar=words, nargs=nargs, help=text.replace("%", "%%"))
    return parser


# --- writing ---


def shown(value: Any) -> str:
    """An option's value as --help and the docs print it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "unset"}[value]
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def write_resolved(config: GRPOConfig, path: str | os.PathLike) -> None:
    """Write every option as YAML that `--config` reads again as it is.

    Paths stand there as they were given, so that the file may move to another machine with the job. Starting over is
    what one command was asked to do: a command with this file continues.
    """
    parts = []
    for name, value in (config.as_given() | {"overwrite_output_dir": False}).items():
        if name in GROUPS:
            parts.append(f"# {GROUPS[name]}\n")
        parts.append(yaml.safe_dump({name: value}, allow_unicode=True))
    write_text_atomic(path, "".join(parts))


def print_config(resolved: ResolvedConfig) -> None:
    """Print each option, its value and where it came from."""
    for name, origin in resolved.origin.items():
        print(f"{name:<30} {shown(getattr(resolved.config, name)):<40} {origin}")
