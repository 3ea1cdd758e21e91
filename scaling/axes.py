"""Which axes are the same dimension: a union-find over atoms, where an axis is a product of atoms and an atom can be a sum of segments.

`view(b, t, heads, head_dim)` factors an atom into a product; `split`, `chunk`, slicing and `cat` cut an atom into segments. Everything
else joins whole axes. Joins come from what operators mean, never from equal numbers; a size is a tuple, one length per recorded width,
and only used to find where a product or a sum divides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from scaling.graph import Size

__all__ = ["Atom", "Axes", "Dim", "Segment", "divides", "product"]


@dataclass(eq=False)
class Atom:
    """A dimension that nothing has factored yet. `facts` are what operators told of it."""

    size: Size
    parent: Atom | None = None
    factors: tuple[Atom, ...] = ()
    segments: list[Segment] = field(default_factory=list)
    facts: set[str] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"<{'|'.join(map(str, self.size))} #{id(self) % 9973}>"


Dim = tuple[Atom, ...]
"""An axis: the product of its atoms, outermost first. () is an axis of length 1."""


@dataclass(eq=False)
class Segment:
    """The part [start, stop) of an atom."""

    start: Size
    stop: Size
    dim: Dim


@dataclass(frozen=True, eq=False)
class Sample:
    """A few entries [start, stop) of an axis that is used as a whole too (a gate's twelve features): `dim` is their own axis.

    They are too few to count among d, so they do not cut the axis. `node` takes them.
    """

    node: fx.Node
    source: Dim
    start: Size
    stop: Size
    dim: Dim


def product(sizes: Iterable[Size], width_count: int) -> Size:
    """The elementwise product."""
    out = (1,) * width_count
    for size in sizes:
        out = tuple(a * b for a, b in zip(out, size, strict=True))
    return out


def divides(a: Size, b: Size) -> bool:
    """Whether a divides b at every width, and the quotient does not fall where a rises: 2048 is 32·64 at one width only."""
    if not all(x != 0 and y % x == 0 for x, y in zip(a, b, strict=True)):
        return False
    ratios = _over(b, a)
    return not any((x - a[0]) * (y - ratios[0]) < 0 for x, y in zip(a, ratios, strict=True))


def _over(a: Size, b: Size) -> Size:
    return tuple(x // y for x, y in zip(a, b, strict=True))


def _plus(a: Size, b: Size) -> Size:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _minus(a: Size, b: Size) -> Size:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _below(a: Size, b: Size) -> bool:
    return all(x < y for x, y in zip(a, b, strict=True))


def _at_most(a: Size, b: Size) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))


class Axes:
    """The axes of every value of one graph. `conflicts` lists joins that the sizes forbade: each is left undone.

    Of the values `data` a few entries may be a sample, of all others (weights) any entries are a part. `samples` is final after `settle`.
    """

    def __init__(self, widths: int, data: Collection[fx.Node] = ()) -> None:
        self.widths = widths
        self.data = data
        self.one: Size = (1,) * widths
        self.zero: Size = (0,) * widths
        self.dims: dict[fx.Node, tuple[Dim, ...]] = {}
        self.conflicts: list[str] = []
        self.joined_cats: list[Atom] = []
        self.samples: list[Sample] = []

    # atoms

    def fresh(self, size: Size, *facts: str) -> Dim:
        """A new axis, not joined to anything."""
        return () if size == self.one else (Atom(size, facts=set(facts)),)

    def root(self, atom: Atom) -> Atom:
        """The representative of an atom's class."""
        while atom.parent is not None:
            if atom.parent.parent is not None:
                atom.parent = atom.parent.parent
            atom = atom.parent
        return atom

    def resolve(self, dim: Dim) -> Dim:
        """The axis as a product of roots that are not factored further."""
        out: list[Atom] = []
        for atom in dim:
            root = self.root(atom)
            if root.factors:
                out += self.resolve(root.factors)
            elif root.size != self.one:
                out.append(root)
        return tuple(out)

    def leaves(self, dim: Dim) -> Iterator[Atom]:
        """All classes an axis is made of, through products and sums."""
        for atom in self.resolve(dim):
            if atom.segments:
                for segment in atom.segments:
                    yield from self.leaves(segment.dim)
            else:
                yield atom

    def size(self, dim: Dim) -> Size:
        """The length of an axis at each width."""
        return product((self.root(atom).size for atom in dim), self.widths)

    def mark(self, dim: Dim, *facts: str) -> None:
        """Adds facts to every class of an axis."""
        for atom in self.leaves(dim):
            atom.facts.update(facts)

    # products

    def factor(self, atom: Atom, sizes: Sequence[Size]) -> Dim:
        """Factors an atom into a product of the given lengths."""
        root = self.root(atom)
        made = tuple(Atom(size, facts=set(root.facts)) for size in sizes if size != self.one)
        segments, root.segments = root.segments, []
        root.factors = made
        if segments:
            inner = product((size for size in sizes[1:]), self.widths)
            if all(self.size(segment.dim) == inner for segment in segments):  # cat([a, b]).view(2, n): as many parts as the first factor
                self.mark(made[:1], "parts")
                for segment in segments:
                    self.join(segment.dim, made[1:])
                return made
            for segment in segments:
                if divides(inner, segment.start) and divides(inner, segment.stop):
                    self.join(segment.dim, self.segment(made, segment.start, segment.stop))
                else:
                    self.conflicts.append(f"a split of {root.size} at {segment.start} that a view does not keep")
        return made

    def regroup(self, dims: Sequence[Dim], sizes: Sequence[Size]) -> tuple[Dim, ...] | None:
        """The axes of a row-major reshape of `dims` to `sizes`; None where an axis does not divide."""
        atoms = [atom for dim in dims for atom in self.resolve(dim)]
        atoms.reverse()
        out: list[Dim] = []
        for size in sizes:
            taken: list[Atom] = []
            rest = size
            while rest != self.one:
                if not atoms:
                    return None
                atom = atoms.pop()
                if divides(atom.size, rest):
                    taken.append(atom)
                    rest = _over(rest, atom.size)
                    continue
                if not divides(rest, atom.size):
                    return None
                atoms.extend(reversed(self.resolve(self.factor(atom, (rest, _over(atom.size, rest))))))
            out.append(tuple(taken))
        return tuple(out)

    # sums

    def segment(self, dim: Dim, start: Size, stop: Size) -> Dim:
        """The part [start, stop) of an axis; the same part asked for twice is the same axis."""
        dim = self.resolve(dim)
        size = self.size(dim)
        if start == self.zero and stop == size:
            return dim
        if not dim or not (_at_most(self.zero, start) and _at_most(start, stop) and _at_most(stop, size)):
            return self.fresh(_minus(stop, start))
        if len(dim) > 1:
            inner = product((atom.size for atom in dim[1:]), self.widths)
            if divides(inner, start) and divides(inner, stop):
                return self.segment(dim[:1], _over(start, inner), _over(stop, inner)) + dim[1:]
            return self.fresh(_minus(stop, start), *dim[-1].facts)
        atom = next(iter(dim))
        if not (self._cut(atom, start) and self._cut(atom, stop)):
            return self.fresh(_minus(stop, start), *atom.facts)
        pieces = [piece for piece in atom.segments if _at_most(start, piece.start) and _at_most(piece.stop, stop)]
        if len(pieces) == 1:
            return pieces[0].dim
        whole = Atom(_minus(stop, start), facts=set(atom.facts))
        whole.segments = [Segment(_minus(p.start, start), _minus(p.stop, start), p.dim) for p in pieces]
        return (whole,)

    def take(self, node: fx.Node, dim: Dim, start: Size, stop: Size) -> Dim:
        """The part [start, stop) of an axis that `node` takes of its input: a sample, until `settle` says else, if it is of few entries."""
        if node.all_input_nodes[0] not in self.data or not self._few(dim, start, stop):
            return self.segment(dim, start, stop)
        taken = self.fresh(_minus(stop, start), *(fact for atom in self.leaves(dim) for fact in atom.facts))
        self.samples.append(Sample(node, dim, start, stop, taken))
        return taken

    def _few(self, dim: Dim, start: Size, stop: Size) -> bool:
        """Whether a part is as long at every width while the axis is not; at one width a guess: whether it is less than half of it."""
        length, size = _minus(stop, start), self.size(dim)
        return _below(_plus(length, length), size) if self.widths == 1 else len(set(length)) == 1 < len(set(size))

    def settle(self) -> None:
        """Cuts axes at what is no sample: all that fills a gap between cuts (x[:, :12] beside x[:, 12:]), or where none reads the whole.

        To be called when the facts are marked.
        """
        by_axis: dict[Dim, list[Sample]] = {}
        for sample in self.samples:
            by_axis.setdefault(self.resolve(sample.source), []).append(sample)
        self.samples = []
        for dim, samples in by_axis.items():
            read = any(atom.facts & {"summed", "dot"} for atom in self.leaves(dim))
            ends = {self.zero, self.size(dim), *(end for atom in dim[:1] for piece in atom.segments for end in (piece.start, piece.stop))}
            starts, stops = set(ends), set(ends)  # where a row of samples can begin, and where one can end
            for sample in sorted(samples, key=lambda sample: sample.start):
                starts |= {sample.stop} if sample.start in starts else set()
            for sample in sorted(samples, key=lambda sample: sample.stop, reverse=True):
                stops |= {sample.start} if sample.stop in stops else set()
            for sample in samples:
                if read and not (sample.start in starts and sample.stop in stops):
                    self.mark(sample.dim, "sample")
                    self.samples.append(sample)
                else:
                    self.join(self.segment(dim, sample.start, sample.stop), sample.dim)

    def _cut(self, atom: Atom, at: Size) -> bool:
        """Makes `at` a boundary between segments of the atom."""
        if at in {self.zero, atom.size} or any(piece.start == at for piece in atom.segments):
            return True
        if not atom.segments:
            atom.segments = [Segment(self.zero, atom.size, (Atom(atom.size, facts=set(atom.facts)),))]
        for index, piece in enumerate(atom.segments):
            if _below(piece.start, at) and _below(at, piece.stop):
                middle, length = _minus(at, piece.start), _minus(piece.stop, piece.start)
                (inner, *more) = self.resolve(piece.dim) or (None,)
                if inner is None or more or inner.segments:
                    left, right = self.segment(piece.dim, self.zero, middle), self.segment(piece.dim, middle, length)
                else:
                    left, right = self.fresh(middle, *inner.facts), self.fresh(_minus(length, middle), *inner.facts)
                    inner.segments = [Segment(self.zero, middle, left), Segment(middle, length, right)]
                atom.segments[index : index + 1] = [Segment(piece.start, at, left), Segment(at, piece.stop, right)]
                return True
        self.conflicts.append(f"a cut of {atom.size} at {at} that other cuts do not allow")
        return False

    def concatenate(self, dims: Sequence[Dim]) -> Dim:
        """The sum of axes, in order."""
        present = [(dim, self.size(dim)) for dim in dims]
        present = [(dim, size) for dim, size in present if size != self.zero]
        if len(present) == 1:
            return present[0][0]
        at = self.zero
        segments = []
        for dim, size in present:
            segments.append(Segment(at, _plus(at, size), dim))
            at = _plus(at, size)
        whole = Atom(at)
        if any(self.resolve(dim) for dim, _ in present):  # axes of length 1 are nothing that a sum could be read off
            whole.segments = segments
        self.joined_cats.append(whole)
        return (whole,)

    # joins

    def join(self, a: Dim, b: Dim) -> None:
        """Makes two axes the same dimension, factor by factor."""
        left, right = list(reversed(self.resolve(a))), list(reversed(self.resolve(b)))
        while left and right:
            x, y = self.root(left.pop()), self.root(right.pop())
            if x.factors or y.factors:  # a join further up factored it meanwhile
                left.extend(reversed(self.resolve((x,))))
                right.extend(reversed(self.resolve((y,))))
            elif x is y:
                continue
            elif x.size == y.size:
                self._merge(x, y)
            elif divides(y.size, x.size):
                left.extend(reversed(self.factor(x, (y.size, _over(x.size, y.size)))))
                right.append(y)
            elif divides(x.size, y.size):
                right.extend(reversed(self.factor(y, (x.size, _over(y.size, x.size)))))
                left.append(x)
            else:
                self.conflicts.append(f"{x.size} against {y.size}")
                return
        if left or right:
            self.conflicts.append(f"{self.size(a)} against {self.size(b)}")

    def _merge(self, x: Atom, y: Atom) -> None:
        x_segments, y_segments = x.segments, y.segments
        y.parent = x
        x.facts |= y.facts
        if not x_segments:
            x.segments = y_segments
        elif y_segments:
            for piece in list(y_segments):
                self._cut(x, piece.start)
            other = Atom(x.size)
            other.segments = y_segments
            for piece in list(x.segments):
                self._cut(other, piece.start)
            for piece in list(x.segments):
                same = [q for q in other.segments if q.start == piece.start and q.stop == piece.stop]
                if same:
                    self.join(piece.dim, same[0].dim)
        if x.segments:
            self.mark((x,), *x.facts)
