"""Option names of TRL, transformers and the original TRL recipe, read from trl_options.yaml.

- aliases, sets: an option here under another name, or one value of an option.
- equal: must have the value of an option here.
- instead: concerns only hardware, launching or logging; a warning says what takes its place.
- refused: would change results and is not supported; an error.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from grpo_jax.run.trackers import PACKAGES, is_installed
from grpo_jax.text import nearest, shorten

logger = logging.getLogger(__name__)

_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SUPPORTED: list[str] = _DATA["supported"].split()
ALIASES: dict[str, str] = _DATA["aliases"]
SETS: dict[str, dict[bool, dict[str, Any]]] = _DATA["sets"]
EQUAL: dict[str, tuple[str, str]] = {n: (o, e["text"]) for e in _DATA["equal"] for n, o in e["names"].items()}
INSTEAD: dict[str, str] = {name: e["text"] for e in _DATA["instead"] for name in e["names"].split()}
REFUSED: dict[str, tuple[list, str]] = {
    name: (accepted, e["text"]) for e in _DATA["refused"] for name, accepted in e["names"].items()
}
TRACKERS: list[str] = _DATA["trackers"].split()
PEFT_UNSUPPORTED: list[str] = _DATA["peft_unsupported"].split()
TRAINER: dict[str, dict[str, str]] = _DATA["trainer"]
HANDLED: set[str] = {*SETS, *EQUAL, *INSTEAD, *REFUSED}  # names that are no option here, and known

# An option's name, its value, and what precedes a sentence about it: "file:line: ", "--flag: " or "".
Entry = tuple[str, Any, str]


@dataclasses.dataclass
class Settled:
    """The entries of one source under the names of this package.

    Args:
        found: option, or a name of EQUAL -> (value, prefix).
        problems: a sentence for each entry that cannot be used.
        unknown: whether one of them names no option at all.
    """

    found: dict[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    unknown: bool = False


def settle(entries: Iterable[Entry], options: Collection[str]) -> Settled:
    """Read the names of one source (a file, the flags, a call), and warn of those that have no effect."""
    settled, sets = Settled(), []
    found, problems = settled.found, settled.problems
    for given, value, where in entries:
        name = ALIASES.get(given, given)
        if name in found:
            problems.append(f"{where}{name} is given twice{_at(found[name][1])}; keep one")
        elif name == "report_to":
            found[name] = (_built_in_tracker(value, where), where)
        elif name in options or name in EQUAL:
            found[name] = (value, where)
        elif name in SETS:
            sets.append((name, value, where))
        elif name in INSTEAD:
            if value not in (None, False, "", "no", "none", "None", [], {}):
                logger.warning("%s%s has no effect here: %s", where, name, INSTEAD[name])
        elif name in REFUSED:
            accepted, reason = REFUSED[name]
            # 0 == False in Python, but only one of them is a value of a switch
            same = [x for x in accepted if value == x and isinstance(value, bool) == isinstance(x, bool)]
            if value is not None and not same:
                problems.append(f"{where}{name} {show(value)} is not supported: {reason}")
        else:
            settled.unknown = True
            close = nearest(name, [*options, *ALIASES], cutoff=0.6) or nearest(name, HANDLED, cutoff=0.6)
            hint = f"nearest: {close[0]}" if close else "--help lists every option"
            problems.append(f"{where}unknown option {name!r}; {hint} (its value: {show(value)})")
    for name, value, where in sets:
        problems += _set(name, value, where, found)
    return settled


def trainer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that keywords of TRL's GRPOTrainer set which ours does not have; warns of one without effect.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: one is not supported; None asks for nothing.
    """
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in {"peft_config", "processing_class", *TRAINER["instead"], *TRAINER["refused"]}:
            close = nearest(name, ["model", "reward_funcs", "args", "train_dataset", "eval_dataset", "tools"])
            raise TypeError(f"GRPOTrainer has no argument {name!r}; nearest: {close[0]}")
        if value is None or (name == "optimizers" and value == (None, None)):
            continue
        if name == "peft_config":
            options |= _lora_options(value)
        elif name == "processing_class":
            options["tokenizer_name_or_path"] = _tokenizer_folder(value)
        elif name in TRAINER["refused"]:
            raise ValueError(f"{name} is not supported: {TRAINER['refused'][name]}")
        else:
            logger.warning("%s has no effect here: %s", name, TRAINER["instead"][name])
    return options


def _tokenizer_folder(tokenizer: Any) -> str:
    """A folder with the files of a tokenizer as it is now: a script may have given it another chat template."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return getattr(tokenizer, "name_or_path", tokenizer)
    from grpo_jax.models.cache import cached_name, filled_folder

    folder = cached_name("tokenizer", tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)
    if not folder.exists():
        with filled_folder(folder) as part:
            tokenizer.save_pretrained(part)
    return str(folder)


def _lora_options(peft: Any) -> dict[str, Any]:
    """What a LoraConfig of PEFT says, as options."""
    if not hasattr(peft, "lora_alpha"):
        raise ValueError(
            f"peft_config must be a LoraConfig, got {type(peft).__name__}; other adapters are not supported"
        )
    defaults = {"bias": "none", "init_lora_weights": True}  # of the others: None, False or empty
    for name in PEFT_UNSUPPORTED:
        if (value := getattr(peft, name, None)) and value != defaults.get(name):
            raise ValueError(f"peft_config: {name} {show(value)} is not supported; leave it out")
    modules = peft.target_modules
    return {
        "use_peft": True,
        "lora_r": peft.r,
        "lora_alpha": peft.lora_alpha,
        "lora_dropout": peft.lora_dropout,
        "use_rslora": peft.use_rslora,
        "lora_target_modules": [modules] if isinstance(modules, str) else modules and sorted(modules),
    }


def show(value: Any) -> str:
    """A value as errors quote it."""
    return shorten(repr(value), 80)


def _at(where: str) -> str:
    return f", first at {where.removesuffix(': ')}" if where else ""


def _set(name: str, value: Any, where: str, found: dict[str, tuple[Any, str]]) -> list[str]:
    """Enter what a name of SETS means; a contradiction of an option next to it is returned as a sentence."""
    if value is None:
        return []
    if not isinstance(value, bool):
        return [f"{where}{name} must be true or false, got {show(value)}"]
    problems = []
    for option, meant in SETS[name][value].items():
        given, at = found.get(option, ("auto", where))
        if given == "auto":
            found[option] = (meant, where)
        elif value and given != meant:
            problems.append(f"{where}{name} {value} contradicts {option} {given}{_at(at)}; keep one")
    return problems


def _built_in_tracker(value: Any, where: str) -> Any:
    """report_to as TRL takes it, a name or a list, without the trackers that are not available."""
    names = value if isinstance(value, list) else [value]
    unsupported = [name for name in names if name in TRACKERS]
    missing = [name for name in names if name in PACKAGES and not is_installed(name)]
    if unsupported:
        logger.warning(
            "%sreport_to %s is not built in; metrics.jsonl holds every update, and `report_to: "
            "tensorboard` adds TensorBoard files",
            where,
            ", ".join(unsupported),
        )
    for name in missing:
        logger.warning(
            "%sreport_to %s has no effect, since its package is not installed; metrics.jsonl holds every "
            'update; to report, pip install -e ".[%s]"',
            where,
            name,
            name,
        )
    left = [name for name in names if name not in (*unsupported, *missing, "none", None)]
    return left[0] if len(left) == 1 else left or "none"
