"""Options from a YAML file and from flags, which override it; and back into a file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import typing
from pathlib import Path
from typing import Any

import yaml

from grpo_jax.files import write_text_atomic
from grpo_jax.run.options import GROUPS, OPTIONS, Config, check_option, option_type
from grpo_jax.run.trackers import PACKAGES, is_installed
from grpo_jax.run.trl_options import ALIASES, OTHER_TRACKERS, RULINGS

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ResolvedConfig:
    """A config and where each value came from.

    Args:
        config: the options.
        origin: option -> "file:line", "--flag" or "default".
        path: the YAML file, None without one.
    """

    config: Config
    origin: dict[str, str]
    path: str | None


def parse_config(
    argv: list[str], *, prog: str, default_config: str | None = None, description: str = ""
) -> ResolvedConfig:
    """The options of a command: defaults, then the YAML file, then flags.

    Args:
        argv: the words after the command.
        prog: the command, for --help.
        default_config: YAML file that applies without --config.
        description: what the command does, for --help.

    Raises:
        ValueError: for a missing or unreadable file, an unknown option (with the nearest
            name), a wrong type or value, or an option that is not supported; says where.
        SystemExit: after --help.
    """
    flags = vars(_parser(prog, description, default_config).parse_args(argv))
    path = flags.pop("config", default_config)
    values = _collect(
        [(name, value, f"{path}:{line}") for name, value, line in read_yaml(path)] if path else []
    )
    from_flags = _collect([(name, _flag_value(name, words), f"--{name}") for name, words in flags.items()])
    # The more specific of two sources of one thing wins, but a flag beats the file's.
    for name, stronger in (("reward_function_name", "reward_fn"), ("tool_functions_module", "tools_script")):
        if name in from_flags:
            values.pop(stronger, None)
    values |= from_flags
    config = Config(**{name: value for name, (value, _) in values.items()})
    origin = {name: values[name][1] if name in values else "default" for name in OPTIONS}
    _warn_of_no_warmup(config, origin)
    _warn_of_no_adapters(config, origin)
    return ResolvedConfig(config, origin, path)


def read_yaml(path: str) -> list[tuple[str, Any, int]]:
    """The top-level entries of a YAML file: (key, value, line).

    Raises:
        ValueError: when the file is missing, is not YAML, or is not a mapping of options.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read config file {path} ({error}); give one with --config FILE") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}:1: a config file must hold `option: value` lines")
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path}:{error.problem_mark.line + 1}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    return [(key.value, values.get(key.value), key.start_mark.line + 1) for key, _ in root.value]


def _collect(entries: list[tuple[str, Any, str]]) -> dict[str, tuple[Any, str]]:
    """Options by name: (checked value, origin), after TRL's and the recipe's names were ruled on."""
    found: dict[str, tuple[Any, str]] = {}
    for given, value, origin in entries:
        name = _option_name(given, value, origin)
        if name is None:
            continue
        if name in found:
            raise ValueError(f"{origin}: {name} is given twice, first at {found[name][1]}; keep one")
        if name == "report_to":
            value = _built_in_tracker(value, origin)
        try:
            found[name] = (check_option(name, value), origin)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    return found


def _option_name(given: str, value: Any, origin: str) -> str | None:
    """The option that a given name means; None when there is nothing to set."""
    if given in OPTIONS:
        return given
    ruling = RULINGS.get(given)
    if ruling is None:
        raise ValueError(f"{origin}: unknown option {given!r}; {_nearest(given)}")
    if ruling.kind == "alias":
        return ruling.text
    if ruling.silent(value):
        return None
    if ruling.kind == "error":
        raise ValueError(f"{origin}: {given} {value!r} is not supported: {ruling.text}")
    logger.warning("%s: %s has no effect here: %s", origin, given, ruling.text)
    return None


def _nearest(name: str, prefix: str = "") -> str:
    close = difflib.get_close_matches(name.lstrip("-"), [*OPTIONS, *ALIASES], n=1)
    return f"nearest: {prefix}{close[0]}" if close else "--help lists every option"


def _built_in_tracker(value: Any, origin: str) -> Any:
    """report_to as the original writes it, a name or a list, without the trackers that are not there."""
    names = value if isinstance(value, list) else [value]
    foreign = [name for name in names if name in OTHER_TRACKERS.split()]
    missing = [name for name in names if name in PACKAGES and not is_installed(name)]
    if foreign:
        logger.warning(
            "%s: report_to %s is not built in; metrics.jsonl holds every update, and `report_to: "
            "tensorboard` adds TensorBoard files",
            origin,
            ", ".join(foreign),
        )
    for name in missing:
        logger.warning(
            "%s: report_to %s has no effect, since its package is not installed; metrics.jsonl holds every "
            'update; to report, pip install -e ".[%s]"',
            origin,
            name,
            name,
        )
    left = [name for name in names if name not in (*foreign, *missing, "none", None)]
    return left[0] if len(left) == 1 else left or "none"


def _warn_of_no_warmup(config: Config, origin: dict[str, str]) -> None:
    if config.lr_scheduler_type == "constant" and config.warmup_steps:
        logger.warning(
            "%s: lr_scheduler_type constant has no warm-up, so warmup_steps %g has no effect (as in "
            "transformers); constant_with_warmup has one",
            origin["warmup_steps"],
            config.warmup_steps,
        )


def _warn_of_no_adapters(config: Config, origin: dict[str, str]) -> None:
    for name in (name for name in OPTIONS if name.startswith("lora_") and not config.use_peft):
        if getattr(config, name) != OPTIONS[name].default:
            logger.warning("%s: %s has no effect without use_peft", origin[name], name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; --help lists every option")

    def parse_args(self, argv):
        options, rest = self.parse_known_args(argv)
        flag = next((word for word in rest if word.startswith("--")), None)
        if flag:
            name = flag.split("=")[0]
            raise ValueError(f"unknown option {name}; {_nearest(name, '--')}")
        if rest:
            raise ValueError(f"{rest[0]!r} belongs to no option; write --option value")
        return options


def _parser(prog: str, description: str, default_config: str | None) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        usage="%(prog)s [--config FILE] [--option value ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file of options; default {default_config or 'none'}"
    )
    group = parser
    for name, field in OPTIONS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        group.add_argument(*_spellings(name), dest=name, **_flag_form(name), help=_help(name, field))
    for name, ruling in RULINGS.items():
        if ruling.kind in ("warning", "error"):
            parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return parser


def _spellings(name: str) -> list[str]:
    return [f"--{name}", *(f"--{alias}" for alias, target in ALIASES.items() if target == name)]


def _flag_form(name: str) -> dict[str, Any]:
    kind, item, _ = option_type(name)
    metavar = "|".join(OPTIONS[name].metadata.get("choices", ())) or (item or kind).__name__.upper()
    if kind is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    return {"nargs": "+" if kind is list else None, "metavar": "JSON" if kind is dict else metavar}


def _help(name: str, field: dataclasses.Field) -> str:
    default = {} if field.default is dataclasses.MISSING else field.default
    return f"{field.metadata['help']} [default: {_shown(default)}]".replace("%", "%%")


def _flag_value(name: str, words: Any) -> Any:
    """A foreign flag's words as the value that YAML would read; others as they are."""
    if name in OPTIONS:
        return words
    if len(words) != 1:
        return words or True
    try:
        return yaml.safe_load(words[0])
    except yaml.YAMLError:
        return words[0]


# --- writing ---


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "unset"}[value]
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def write_resolved(config: Config, path: str | os.PathLike) -> None:
    """Write every option as YAML that `--config` reads again as it is."""
    parts = []
    for name in OPTIONS:
        if name in GROUPS:
            parts.append(f"# {GROUPS[name]}\n")
        parts.append(yaml.safe_dump({name: getattr(config, name)}, allow_unicode=True))
    write_text_atomic(path, "".join(parts))


def print_config(resolved: ResolvedConfig) -> None:
    """Print each option, its value and where it came from."""
    for name, origin in resolved.origin.items():
        print(f"{name:<30} {_shown(getattr(resolved.config, name)):<40} {origin}")
