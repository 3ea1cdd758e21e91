"""Repeated blocks on one line: `h.0.attn.weight`, …, `h.11.attn.weight` as `h.[0-11].attn.weight`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

__all__ = ["fold", "template"]

INDEX = re.compile(r"(?:(?<=\.)|(?<!\S))\d+(?=\.|\)|$)")
"""A whole dotted part that is a number: the 3 of h.3.attn and of "(in h.3)", not that of layer3 or conv3d."""


def template(name: str) -> str:
    """The name with every index left open; two names of one template may share a line.

    >>> template("h.3.experts.0.w1")
    'h.[].experts.[].w1'
    """
    return INDEX.sub("[]", name)


def fold(names: Iterable[str]) -> list[str]:
    """The fewest lines that stand for exactly these names, in the order in which they first occur.

    Indices fold into one line only where every combination that the line stands for is there.

    >>> fold(["h.0.w", "h.1.w", "h.2.w", "h.4.w", "out.w"])
    ['h.[0-2,4].w', 'out.w']
    >>> fold(["stage.0.block.0.w", "stage.0.block.1.w", "stage.1.block.0.w"])
    ['stage.0.block.[0-1].w', 'stage.1.block.0.w']
    """
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        groups[tuple(INDEX.split(name))].append(tuple(int(index) for index in INDEX.findall(name)))
    return [_fill(parts, box) for parts, indices in groups.items() for box in _boxes(list(dict.fromkeys(indices)))]


def _boxes(indices: list[tuple[int, ...]]) -> list[tuple[list[int], ...]]:
    """The index tuples as disjoint products of sets: first indices that have the same rest go together."""
    if not indices[0]:
        return [()]
    rests: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for first, *rest in indices:
        rests[first].append(tuple(rest))
    together: dict[tuple, list[int]] = defaultdict(list)
    for first, rest in rests.items():
        together[tuple(sorted(rest))].append(first)
    return [(sorted(firsts), *box) for rest, firsts in together.items() for box in _boxes(list(rest))]


def _fill(parts: tuple[str, ...], box: tuple[list[int], ...]) -> str:
    return parts[0] + "".join(_ranges(numbers) + part for numbers, part in zip(box, parts[1:], strict=True))


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"[{text}]"
