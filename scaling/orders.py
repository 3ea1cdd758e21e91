"""Orders of magnitude: exponents of d, what is known of one value (`State`), and values whose parts differ (`Pieces`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = [
    "CONSTANT",
    "NOTHING",
    "UNKNOWN",
    "ZERO",
    "Exponent",
    "Pieces",
    "Root",
    "State",
    "joined",
    "least",
    "minus",
    "plus",
    "shared",
    "times",
    "top",
    "zipped",
]

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

Exponent = Fraction | float | None
"""The power of d that a size follows: a Fraction; NOTHING where the value is exactly zero; None where it is not known."""

NOTHING = -math.inf
ZERO = Fraction(0)

Root = tuple[str, tuple]
"""A random weight whose rows made a value's entries independent, and which part of them was taken since."""


def top(*exponents: Exponent) -> Exponent:
    """The size of a sum: the largest; not known if one term is not."""
    known = [x for x in exponents if x is not None]
    return max(known, default=NOTHING) if len(known) == len(exponents) else None


def least(a: Exponent, b: Exponent) -> Exponent:
    """The smaller of two bounds: the known one if only one is known."""
    return min((x for x in (a, b) if x is not None), default=None)


def plus(*exponents: Exponent) -> Exponent:
    """The size of a product; nothing if one factor is nothing."""
    if NOTHING in exponents:
        return NOTHING
    return None if None in exponents else sum((x for x in exponents if x is not None), ZERO)


def times(exponent: Exponent, power: Fraction | int) -> Exponent:
    """The size of a power of a value that is not zero."""
    if exponent is None:
        return None
    return exponent if exponent == NOTHING else exponent * power


def minus(a: Exponent, b: Exponent) -> Exponent:
    """The size of a quotient; not known where the divisor is nothing."""
    if a == NOTHING:
        return NOTHING
    return None if a is None or b is None or b == NOTHING else a - b


@dataclass(frozen=True)
class State:
    """What is known of a value: exponents of d.

    `init` is its RMS at init and `mean` that of its average over growing axes (a sum over n entries is n·mean, or √n·init where the mean
    is smaller); `change` the RMS of its change since init; `after` its RMS after the change; `roots` the random weights it comes from.
    """

    init: Exponent
    mean: Exponent
    change: Exponent = NOTHING
    after: Exponent = NOTHING
    roots: frozenset[Root] = frozenset()

    @classmethod
    def of(
        cls, init: Exponent, mean: Exponent, change: Exponent, roots: frozenset[Root] = frozenset(), after: Exponent | str = "top"
    ) -> State:
        """A state; `after` is the larger of init and change where it is not given."""
        return cls(init, mean, change, top(init, change) if after == "top" else after, roots)  # pyright: ignore[reportArgumentType]

    @property
    def known(self) -> bool:
        """Whether all of it is known."""
        return None not in (self.init, self.mean, self.change, self.after)

    def scaled(self, power: Exponent) -> State:
        """The value times a number of size d**power."""
        return replace(
            self,
            init=plus(self.init, power),
            mean=plus(self.mean, power),
            change=plus(self.change, power),
            after=plus(self.after, power),
        )


CONSTANT = State(ZERO, ZERO, NOTHING, ZERO)
UNKNOWN = State(None, None, None, None)


def shared(a: State, b: State) -> bool:
    """Whether two values come from the same random entries, so that their product does not average out."""
    for name, path in a.roots:
        for other, way in b.roots:
            if name == other and path[: len(way)] == way[: len(path)]:
                return True
    return False


def joined(states: Sequence[State]) -> State:
    """The sum or the concatenation of values."""
    first, *rest = states
    if not rest:
        return first
    return State(
        top(*(s.init for s in states)),
        top(*(s.mean for s in states)),
        top(*(s.change for s in states)),
        top(*(s.after for s in states)),
        frozenset().union(*(s.roots for s in states)),
    )


@dataclass(frozen=True, eq=False)
class Pieces(Generic[T]):
    """A value whose parts may differ: `labels`, of the value's shape at the first width, index `parts`; None where all is one part."""

    parts: tuple[T, ...]
    labels: Tensor | None = None

    @classmethod
    def of(cls, value: T) -> Pieces[T]:
        """All of it is one part."""
        return cls((value,))

    @classmethod
    def labelled(cls, parts: Sequence[T], labels: Tensor) -> Pieces[T]:
        """Parts that are equal, or that no label names, become one or none."""
        present = [int(i) for i in labels.unique()] or [0]  # an empty value has one part too
        kept: list[T] = []
        renumbered = torch.zeros(len(parts), dtype=torch.int16)
        for i in present:
            if parts[i] not in kept:
                kept.append(parts[i])
            renumbered[i] = kept.index(parts[i])
        return cls(tuple(kept), renumbered[labels.long()] if len(kept) > 1 else None)

    def whole(self, join: Callable[[Sequence[T]], T]) -> T:
        """All parts as one."""
        return self.parts[0] if len(self.parts) == 1 else join(self.parts)

    def each(self, function: Callable[[T], S]) -> Pieces[S]:
        """The function of every part."""
        parts = [function(part) for part in self.parts]
        return Pieces(tuple(parts)) if self.labels is None else Pieces.labelled(parts, self.labels)

    def within(self, where: tuple[slice, ...], join: Callable[[Sequence[T]], T]) -> T:
        """The parts that a range of the value has, as one."""
        if self.labels is None:
            return self.parts[0]
        return join([self.parts[int(i)] for i in self.labels[where].unique()])

    def cuts(self, axis: int) -> list[int]:
        """Where along an axis the labels change, with both ends left out."""
        if self.labels is None:
            return []
        rows = self.labels.movedim(axis, 0).reshape(self.labels.shape[axis], -1)
        return [int(i) + 1 for i in (rows[1:] != rows[:-1]).any(1).nonzero().flatten()]


def zipped(function: Callable[[S, T], R], a: Pieces[S], b: Pieces[T], shape: Sequence[int]) -> Pieces[R]:
    """The function of every pair of parts that meet, broadcast to a shape."""
    if a.labels is None and b.labels is None:
        return Pieces.of(function(a.parts[0], b.parts[0]))
    left, right = (torch.zeros((), dtype=torch.int16) if p.labels is None else p.labels for p in (a, b))
    labels = (left * len(b.parts) + right).expand(tuple(shape))
    made: dict[int, R] = {int(i): function(a.parts[int(i) // len(b.parts)], b.parts[int(i) % len(b.parts)]) for i in labels.unique()}
    index = torch.zeros(len(a.parts) * len(b.parts), dtype=torch.int16)
    for place, key in enumerate(made):
        index[key] = place
    return Pieces.labelled(list(made.values()), index[labels.long()])
