"""Reads a program that XLA compiled for a TPU: FLOP, bytes of memory, collectives and copies, loops counted as often as they run.

XLA's own `cost_analysis` counts a loop's body once, and what was fetched into on-chip memory once more when it is read
there. Here a loop counts as often as its condition says; one whose number of turns is not in the program, as that of
decode, counts once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "8": 1, "16": 2, "32": 4, "64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
SLICES = {"dynamic-slice", "gather", "slice"}  # which read no more of an array than they return
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which write no more than this operand


class Array(NamedTuple):
    """An array's type and where it lies; `size` is its bytes with the padding of its tiles."""

    kind: str
    shape: tuple[int, ...]
    size: int
    on_chip: bool

    @property
    def hbm(self) -> int:
        """Bytes in the device's main memory."""
        return 0 if self.on_chip else self.size


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program; `arrays` are its results."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def called(self, what: str = "calls") -> str | None:
        """The computation of an attribute."""
        found = re.search(rf"\b{what}=%([^\s,)]+)", self.text)
        return found and found[1]


class Ran(NamedTuple):
    """An instruction, how often it runs, and whether as a part of a fusion or in a loop of unknown length."""

    of: Instruction
    computation: str
    times: int
    fused: bool
    in_loop: bool


class Program:
    """The text of a compiled program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        for line in text.splitlines():
            if match := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
                self.computations[match[2]] = inside = {}
                self.entry = match[2] if match[1] else getattr(self, "entry", match[2])
            elif match := re.match(r"\s+(ROOT )?%(\S+) = ((?:\(.*?\)|\S+)) ([a-z][\w-]*)\((.*)", line):
                kind, rest = match[3], match[5]
                operands = re.findall(r"%([^\s,()]+)", rest[: _closing(rest)])
                arrays = tuple(map(_array, re.finditer(_ARRAY, kind)))
                inside[match[2]] = Instruction(match[2], match[4], arrays, (*operands,), rest, bool(match[1]))

    def run(
        self, computation: str | None = None, times: int = 1, fused=False, in_loop=False
    ) -> Iterator[Ran]:
        """Every instruction that the program executes; of a conditional those of all branches."""
        computation = computation or self.entry
        for of in self.computations[computation].values():
            yield Ran(of, computation, times, fused, in_loop)
            if of.opcode == "while":
                turns = self._turns(of.called("condition"))
                yield from self.run(of.called("body"), times * (turns or 1), fused, in_loop or not turns)
            elif of.opcode == "fusion":
                yield from self.run(of.called(), times, True, in_loop)
            elif of.opcode in ("call", "async-start"):
                yield from self.run(of.called() or of.called("to_apply"), times, fused, in_loop)
            elif of.opcode == "conditional":
                for branch in re.findall(
                    r"%([^\s,}]+)", of.text.partition("branch_computations=")[2].partition("}")[0]
                ):
                    yield from self.run(branch, times, fused, in_loop)

    def _turns(self, condition: str) -> int | None:
        lines = self.computations[condition]
        root = next(i for i in lines.values() if i.is_root)
        bound = lines.get(root.operands[-1])
        if root.opcode != "compare" or "direction=LT" not in root.text or bound.opcode != "constant":
            return None
        return int(bound.text.partition(")")[0])

    def flop(self) -> float:
        """Of all matrix products."""
        return sum(
            times * self._product(self.computations[where], of)
            for of, where, times, *_ in self.run()
            if of.opcode in ("convolution", "dot")
        )

    def _product(self, inside: dict[str, Instruction], of: Instruction) -> float:
        lhs, rhs = (inside[name].arrays[0].shape for name in of.operands)
        if of.opcode == "dot":
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", of.text)[1]
            return 2.0 * math.prod(of.arrays[0].shape) * math.prod(lhs[int(d)] for d in dims.split(",") if d)
        of_lhs, of_rhs, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", of.text).groups()
        out = dict(zip(of_out, of.arrays[0].shape, strict=True))
        count = 2.0 * out["b"] * out["f"] * rhs[of_rhs.index("i")]
        for i in range(len(of_out) - 2):
            count *= _taps(of.text, i, lhs[of_lhs.index(str(i))], out[str(i)])
        return count

    def traffic(self, in_loop: bool = False) -> int:
        """Bytes read from and written to main memory; `in_loop`: by a turn of a loop of unknown length."""
        return sum(
            times * self._moved(self.computations[where], of)
            for of, where, times, fused, looped in self.run()
            if not fused and (looped or not in_loop)
        )

    def _moved(self, inside: dict[str, Instruction], of: Instruction) -> int:
        if of.opcode in FREE or of.opcode.endswith("-done"):
            return 0
        operands = [inside[name].arrays for name in of.operands]
        if of.opcode in ("copy-start", "slice-start"):
            to = of.arrays[of.opcode == "slice-start"]
            return to.size * (not operands[0][0].on_chip) + to.hbm
        if of.opcode in SLICES:
            return of.arrays[0].size * (not operands[0][0].on_chip) + of.arrays[0].hbm
        if of.opcode in IN_PLACE:
            return operands[IN_PLACE[of.opcode]][0].size * (not of.arrays[0].on_chip)
        if of.opcode != "fusion":
            return sum(a.hbm for arrays in (*operands, of.arrays) for a in arrays)
        inputs = [(i, arrays[0]) for i, arrays in enumerate(operands) if arrays and arrays[0].hbm]
        read = sum(min(self._read(of.called(), i, a.size)[0], a.size) for i, a in inputs)
        return read + sum(self._written(of.called(), i, a) for i, a in enumerate(of.arrays) if a.hbm)

    @functools.cache  # noqa: B019
    def _read(self, computation: str, number: int, whole: int) -> tuple[int, bool]:
        """Bytes of a fusion's parameter that it reads, and whether it returns the parameter itself."""
        inside = self.computations[computation]
        names = {n for n, i in inside.items() if i.opcode == "parameter" and i.text.startswith(f"{number})")}
        size = 0
        for of in inside.values():
            at = [i for i, name in enumerate(of.operands) if name in names]
            if of.opcode == "bitcast" and at:
                names.add(of.name)
            elif of.opcode == "fusion":
                reads = [self._read(of.called(), i, whole) for i in at]
                size += sum(bytes_read for bytes_read, _ in reads)
                names |= {of.name for _, returned in reads if returned}
            elif at == [0] and of.opcode in SLICES:
                size += of.arrays[0].size
            elif at and not (at == [0] and of.opcode in IN_PLACE):
                size += whole
        return size, any(inside[name].is_root for name in names)

    def _written(self, computation: str, number: int, whole: Array) -> int:
        inside = self.computations[computation]
        root = next(i for i in inside.values() if i.is_root)
        root = inside[root.operands[number]] if root.opcode == "tuple" else root
        while root.opcode == "bitcast":
            root = inside[root.operands[0]]
        if root.opcode == "fusion":
            return self._written(root.called(), 0, whole)
        if root.opcode in IN_PLACE:
            return inside[root.operands[IN_PLACE[root.opcode]]].arrays[0].size
        return whole.size

    def collectives(self, in_loop: bool = False) -> dict[str, tuple[int, int]]:
        """(how many run, bytes of their results on a device) by kind; `in_loop` as for `traffic`."""
        count, size = Counter(), Counter()
        for of, _, times, _, looped in self.run():
            kind = of.opcode.removesuffix("-start")
            if kind in COLLECTIVES and (looped or not in_loop):
                count[kind] += times
                arrays = (
                    of.arrays[1:] or of.arrays if kind != of.opcode else of.arrays
                )  # a start's first is an operand
                size[kind] += times * sum(a.size for a in arrays)
        return {kind: (count[kind], size[kind]) for kind in count}

    def inner_loops(self) -> list[str]:
        """Loops within a loop of unknown length."""
        return [f"loop {of.name}" for of, _, _, _, in_loop in self.run() if in_loop and of.opcode == "while"]

    def copies(self, least: int) -> list[str]:
        """Instructions in a loop of unknown length that copy, transpose or pad an array of so many elements."""
        return [
            f"{of.name} {of.arrays[0].kind}{list(of.arrays[0].shape)}"
            for of, _, _, fused, in_loop in self.run()
            if in_loop
            and not fused
            and of.arrays
            and math.prod(of.arrays[0].shape) >= least
            and self._copies(of)
        ]

    def _copies(self, of: Instruction) -> bool:
        if of.opcode == "copy-start":  # to fetch into on-chip memory is to read
            return not of.arrays[0].on_chip
        if of.opcode != "fusion":
            return of.opcode in ("copy", "transpose", "pad")
        moves = {
            "copy",
            "transpose",
            "pad",
            "bitcast",
            "reshape",
            "parameter",
            "constant",
            "convert",
            "broadcast",
        }
        return {i.opcode for i in self.computations[of.called()].values()} <= moves


_ARRAY = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def _array(match: re.Match) -> Array:
    shape = tuple(int(d) for d in match[2].split(",") if d)
    order = [int(d) for d in (match[3] or "").split(",") if d]
    padded, layout = [shape[d] for d in order], match[4] or ""  # the fastest dimension first
    tile = re.search(r"T\(([\d,]+)\)", layout)
    for i, side in enumerate(reversed(tile[1].split(","))) if tile else ():
        if i < len(padded):
            padded[i] += -padded[i] % int(side)
    item = BYTES.get(match[1]) or BYTES[re.search(r"\d+", match[1])[0]]
    return Array(match[1], shape, item * math.prod(padded), "S(" in layout)


def _closing(text: str) -> int:
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i
    return len(text)


def _taps(text: str, i: int, size: int, out: int) -> int:
    """Pairs of an output and a window position of a convolution's dimension that hit an input, as XLA counts them."""

    def of(what: str, default: str) -> str:
        window = re.search(r"window=\{([^}]*)\}", text)[1]
        found = re.search(rf"\b{what}=(\S+)", window)
        return found[1].split("x")[i] if found else default

    window, stride, low = int(of("size", "1")), int(of("stride", "1")), int(of("pad", "0_0").split("_")[0])
    lhs, rhs = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    outs = np.arange(out) * stride - low
    total = 0
    for k in range(window):
        at = outs + k * rhs
        total += int(((at >= 0) & (at <= (size - 1) * lhs) & (at % lhs == 0)).sum())
    return total
