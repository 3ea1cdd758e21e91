"""Which dimensions grow with the width d, and how: every class of axes as an exact expression in d.

From several widths this is a fact, read off the sizes. From one model it is a question of intent, answered by anchors and said to be a
guess: what an input, a lookup or a kernel fixes stays; the class that most matrices use grows, and so does all that is not far from it.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import sympy

from scaling.axes import Atom, Axes, Dim
from scaling.errors import NoSuchAxis, UnknownName
from scaling.graph import LayerGraph, Size
from scaling.limits import WIDTH
from scaling.records import AxisClass

__all__ = ["Growth", "Override", "growth_of"]

Override = Mapping[str, "int | Sequence[int]"]
FAR = 16
"""A class this many times smaller or larger than the growing axes it shares a matrix with is taken as fixed (ranks, states, codes)."""

ANCHORS = {
    "looked_up": "looked up by an index",
    "kernel": "taps of a kernel",
    "input": "an axis of an input",
    "indexed": "taken apart by index",
    "bank": "a number of separate maps",
    "repeated": "a number of repeats",
    "parts": "a number of parts put together",
    "sample": "a few entries of an axis",
    "classes": "classes of a loss",
}


@dataclass(frozen=True, eq=False)
class Growth:
    """`of(dim)` is the length of an axis in d; `sizes` is d at every width.

    `products` are axes with a length of their own, whatever their factors do: 8 groups of a stream that is 4 heads × 16 stay 8.
    """

    axes: Axes
    sizes: Size
    leaves: dict[Atom, sympy.Expr]
    classes: tuple[AxisClass, ...]
    products: dict[Dim, sympy.Expr] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The value of d at the first width."""
        return self.sizes[0]

    def of(self, dim: Dim) -> sympy.Expr:
        """The length of an axis, exact in d."""
        resolved = self.axes.resolve(dim)
        return self.products[resolved] if resolved in self.products else sympy.Mul(*map(self._atom, resolved))

    def _atom(self, atom: Atom) -> sympy.Expr:
        if atom.segments:
            return sympy.Add(*(self.of(segment.dim) for segment in atom.segments))
        return self.leaves.get(atom, sympy.Integer(atom.size[0]))

    def grows(self, dim: Dim) -> bool:
        """Whether the length depends on d."""
        return self.of(dim).has(WIDTH)


def growth_of(
    graph: LayerGraph,
    axes: Axes,
    *,
    widths: Sequence[int] | None,
    heads: str,
    fixed: Override | None = None,
    grows: Override | None = None,
) -> Growth:
    """Decides every class of the weights' axes.

    Args:
        graph: the layer graph, at one or several widths.
        axes: its axes, marked with what the uses tell.
        widths: the factory's widths; None to read d off the class that most matrices use.
        heads: "grow" or "fixed", where one model splits a growing axis into heads × head_dim.
        fixed: `{weight pattern: axis or axes}` taken as fixed whatever the rest says.
        grows: the same, taken as growing.

    Raises:
        NoSuchAxis: if an override matches no axis.
        UnknownName: for any other `heads`.
    """
    if heads not in {"grow", "fixed"}:
        raise UnknownName("heads", heads, ("grow", "fixed"))
    weights = {call.names[0]: (call.names, axes.dims[call.node]) for call in graph.weights}
    forced, wholes = _settled([*_overrides(axes, weights, fixed, "fixed"), *_overrides(axes, weights, grows, "grows")])
    hub = _hub(axes, weights, forced)
    if axes.widths > 1:
        measured = tuple(widths) if widths is not None else axes.size(hub)
        decided = {atom: _known(atom.size, measured) for _, dims in weights.values() for dim in dims for atom in axes.leaves(dim)}
    else:
        measured = axes.size(hub)
        decided = _guess(axes, weights, hub, heads, forced)
    size = measured[0]
    leaves, reasons = {}, {}
    for atom, (expression, reason) in decided.items():
        choice = forced.get(atom)
        if choice is not None and expression.has(WIDTH) != (choice[0] == "grows"):
            expression = _proportional(atom.size[0], size) if choice[0] == "grows" else sympy.Integer(atom.size[0])
            reason = choice[1]
        leaves[atom], reasons[atom] = expression, (reason, axes.widths > 1 or choice is not None)
    products = {
        dim: _proportional(axes.size(dim)[0], size) if option == "grows" else sympy.Integer(axes.size(dim)[0])
        for dim, (option, _) in wholes.items()
    }
    return Growth(
        axes=axes,
        sizes=measured,
        leaves=leaves,
        classes=_classes(axes, weights, leaves, reasons) + _whole_classes(axes, weights, products, wholes),
        products=products,
    )


@dataclass(frozen=True)
class _Override:
    """What is said of one axis: `atoms` are the classes that carry it out."""

    option: str
    reason: str
    dim: Dim
    atoms: tuple[Atom, ...]


Choices = dict[Atom, tuple[str, str]]


def _settled(said: list[_Override]) -> tuple[Choices, dict[Dim, tuple[str, str]]]:
    """The classes that overrides decide, and axes decided as a whole, where a factor grows by one override and is fixed by another."""
    options: dict[Atom, set[str]] = {}
    for one in said:
        for atom in one.atoms:
            options.setdefault(atom, set()).add(one.option)
    forced: Choices = {}
    wholes: dict[Dim, tuple[str, str]] = {}
    for one in said:
        forced |= {atom: (one.option, one.reason) for atom in one.atoms if len(options[atom]) == 1}
        if one.dim and (not one.atoms or any(len(options[atom]) > 1 for atom in one.atoms)):
            wholes[one.dim] = one.option, one.reason
    return forced, wholes


def _overrides(axes: Axes, weights: dict, override: Override | None, option: str) -> list[_Override]:
    out: list[_Override] = []
    for pattern, which in (override or {}).items():
        matched = [dims for names, dims in weights.values() if any(fnmatch.fnmatchcase(name, pattern) for name in names)]
        if not matched:
            close = ", ".join(list(weights)[:8])
            raise NoSuchAxis(option, pattern, f"matches no weight; there are {close}, …")
        for axis in (which,) if isinstance(which, int) else which:
            found = [dims[axis] for dims in matched if -len(dims) <= axis < len(dims)]
            if not found:
                raise NoSuchAxis(option, pattern, f"has no axis {axis}: the weights it matches have {max(len(d) for d in matched)} axes")
            for dim in found:
                leaves = list(axes.leaves(dim))
                chosen = leaves if option == "fixed" else [atom for atom in leaves if "dot" not in atom.facts][:1] or leaves[:1]
                out.append(_Override(option, f"{option}={{{pattern!r}: {axis}}}", axes.resolve(dim), tuple(chosen)))
    return out


def _hub(axes: Axes, weights: dict, forced: Choices) -> Dim:
    """The axis that most matrices use: of equals the smallest, so that other axes are whole multiples of d."""
    count: Counter[tuple[Atom, ...]] = Counter()
    anchored: set[tuple[Atom, ...]] = set()
    for _, dims in weights.values():
        present = [_whole_maps(axes.resolve(dim)) for dim in dims if axes.resolve(dim)]
        if len(present) < 2:
            continue
        for dim in present:
            pieces = [axes.resolve(s.dim) for s in dim[0].segments] if len(dim) == 1 and dim[0].segments else [dim]
            for piece in set(pieces):
                if axes.widths > 1 and len(set(axes.size(piece))) == 1:
                    continue  # what several widths show to be fixed is not the width
                count[piece] += 1
                leaves = list(axes.leaves(piece))
                if _facts(axes, piece) & {"looked_up", "kernel", "bank"} or any(forced.get(atom, ("",))[0] == "fixed" for atom in leaves):
                    anchored.add(piece)
    free = {dim: n for dim, n in count.items() if dim not in anchored}
    inner = {dim: n for dim, n in free.items() if not _ends(axes, dim)} or free
    candidates = free if free and max(free.values()) > max(inner.values(), default=0) else inner
    candidates = {dim: n for dim, n in candidates.items() if _has(axes, dim, "summed")} or candidates
    if not candidates:
        largest = max((dim for _, dims in weights.values() for dim in dims), key=lambda dim: axes.size(dim), default=())
        return axes.resolve(largest)
    most = [dim for dim, n in candidates.items() if n == max(candidates.values())]
    largest = max(axes.size(dim) for dim in most)
    return min((dim for dim in most if axes.size(dim)[0] * FAR > largest[0]), key=axes.size)


def _ends(axes: Axes, dim: Dim) -> bool:
    """Whether an axis is one of an input or only leaves the model."""
    facts = _facts(axes, dim)
    return bool(facts & {"input", "classes"}) or ("output" in facts and "summed" not in facts)


def _known(sizes: Sequence[int], widths: Sequence[int]) -> tuple[sympy.Expr, str]:
    """The exact law through the sizes at all widths: constant, proportional, a power, or affine."""
    if len(set(sizes)) == 1:
        return sympy.Integer(sizes[0]), "the same at every width"
    if len({Fraction(s, w) for s, w in zip(sizes, widths, strict=True)}) == 1:
        return _proportional(sizes[0], widths[0]), "proportional to d at every width"
    for power in (2, Fraction(1, 2), 3):
        if len({Fraction(s**2) / Fraction(w) ** int(2 * power) for s, w in zip(sizes, widths, strict=True)}) == 1:
            return sympy.Rational(sizes[0]) / widths[0] ** sympy.Rational(power) * WIDTH ** sympy.Rational(power), f"grows as d^({power})"
    slope = sympy.Rational(sizes[-1] - sizes[0], widths[-1] - widths[0]) if widths[-1] != widths[0] else sympy.Integer(0)
    offset = sizes[0] - slope * widths[0]
    if slope != 0 and all(slope * w + offset == s for s, w in zip(sizes, widths, strict=True)) and len(sizes) > 2:
        return slope * WIDTH + offset, "affine in d at every width"
    said = ", ".join(map(str, sizes))
    if any((s - sizes[0]) * (w - widths[0]) < 0 or (s - sizes[-1]) * (w - widths[-1]) < 0 for s, w in zip(sizes, widths, strict=True)):
        return sympy.Integer(sizes[0]), f"no law: {said}"
    return _proportional(sizes[0], widths[0]), f"grows with d, rounded: {said}"


def _proportional(size: int, width: int) -> sympy.Expr:
    return sympy.Rational(size, width) * WIDTH


def _guess(axes: Axes, weights: dict, hub: Dim, heads: str, forced: Choices) -> dict[Atom, tuple[sympy.Expr, str]]:
    size, *_ = axes.size(hub)
    decided: dict[Atom, tuple[bool, str]] = {}
    for atom, (option, reason) in forced.items():
        decided[atom] = option == "grows", reason
    hub_leaves = set(axes.leaves(hub))
    for dim in (dim for _, dims in weights.values() for dim in dims if axes.size(dim)[0] == size):
        decided |= {atom: (True, "features of no weight, as many as what grows") for atom in _features(axes, dim) if atom not in decided}
    axes_of_weights = [piece for _, dims in weights.values() for dim in dims for piece in _pieces(axes, dim)]
    singles = [dim for dim in axes_of_weights if len(dim) == 1]
    products = sorted(
        (dim for dim in axes_of_weights if len(dim) > 1),
        key=lambda dim: (hub_leaves.isdisjoint(axes.leaves(dim)), not _has(axes, dim, "dot")),
    )
    if len(hub) == 1:
        decided |= {atom: (True, "the axis that most matrices use") for atom in hub_leaves if atom not in decided}
    for dim in products:
        _choose_factor(axes, dim, decided, hub_leaves, size, heads)
    _heads_apart(axes, weights, decided, heads)
    _spread(axes, weights, decided)
    for dim in singles:
        decided |= {atom: _single(atom, size) for atom in axes.leaves(dim) if atom not in decided}
    everything = (atom for _, dims in weights.values() for dim in dims for atom in axes.leaves(dim))
    decided |= {atom: _single(atom, size) for atom in everything if atom not in decided}
    return {
        atom: (_proportional(atom.size[0], size) if grows else sympy.Integer(atom.size[0]), reason)
        for atom, (grows, reason) in decided.items()
    }


def _features(axes: Axes, dim: Dim) -> list[Atom]:
    """Of an axis of features that no weight makes (sines of a position), what grows where the axis does: its frequencies."""
    pieces = _pieces(axes, dim)
    if any("constant" not in atom.facts or "emitted" in atom.facts or _anchored([atom]) for piece in pieces for atom in piece):
        return []
    return [piece[0] for piece in pieces]


def _heads_apart(axes: Axes, weights: dict, decided: dict[Atom, tuple[bool, str]], heads: str) -> None:
    """Of a weight (d, heads, head_dim), where the heads are no factor of a product, one of the two grows.

    The axis that queries and keys are summed over is head_dim; the one beside it is the heads, in the values' weight too.
    """
    free = [
        {atom for dim in dims for atom in axes.leaves(dim) if atom not in decided and not _anchored([atom])}
        for _, dims in weights.values()
        if len([dim for dim in dims if axes.resolve(dim) and not _has(axes, dim, "kernel")]) > 2
    ]
    free = [pair for pair in free if len(pair) == 2]
    dotted = {atom for pair in free for atom in pair if "dot" in atom.facts}
    number = {atom for pair in free if len(pair & dotted) == 1 for atom in pair - dotted}
    for pair in (pair for pair in free if len(pair & number) == 1):
        decided |= dict.fromkeys(pair & number, (heads == "grow", "heads of (heads, head_dim)"))
        decided |= dict.fromkeys(pair - number, (heads == "fixed", "head_dim of (heads, head_dim)"))


def _pieces(axes: Axes, dim: Dim) -> list[Dim]:
    """An axis, or the axes it is a sum of."""
    resolved = axes.resolve(dim)
    if len(resolved) == 1 and resolved[0].segments:
        return [piece for segment in resolved[0].segments for piece in _pieces(axes, segment.dim)]
    return [_whole_maps(resolved)] if resolved else []


def _whole_maps(dim: Dim) -> Dim:
    """A product less the factors that are taken apart by index: gates, q‖k‖v."""
    return tuple(atom for atom in dim if "indexed" not in atom.facts) or dim


def _facts(axes: Axes, dim: Dim) -> set[str]:
    return {fact for atom in axes.leaves(dim) for fact in atom.facts}


def _has(axes: Axes, dim: Dim, fact: str) -> bool:
    return fact in _facts(axes, dim)


def _spread(axes: Axes, weights: dict, decided: dict[Atom, tuple[bool, str]]) -> None:
    """What shares a matrix with a growing axis not far larger grows too, and so on: stages of a convolutional net, each twice the last."""
    matrices = [[_pieces(axes, dim) for dim in dims] for _, dims in weights.values() if len(dims) > 1]
    changed = True
    while changed:
        changed = False
        for pieces in matrices:
            growing = [axes.size(dim)[0] for dims in pieces for dim in dims if any(decided.get(a, (False,))[0] for a in axes.leaves(dim))]
            for dim in (dim for dims in pieces for dim in dims if len(dim) == 1 and growing):
                for atom in axes.leaves(dim):
                    choice = _single(atom, min(growing)) if atom not in decided else (False, "")
                    if choice[0]:
                        decided[atom] = choice
                        changed = True


LEAVES_ONLY = "it only leaves the model"


def _leaves_only(atom: Atom) -> bool:
    return "output" in atom.facts and "summed" not in atom.facts


def _never_read(atom: Atom) -> bool:
    """Whether no weight and no product of activations sums over what a weight makes: routing logits, the parameters of a curve."""
    return "emitted" in atom.facts and atom.facts.isdisjoint({"summed", "dot"})


def _single(atom: Atom, hub: int) -> tuple[bool, str]:
    for fact, reason in ANCHORS.items():
        if fact in atom.facts:
            return False, reason
    if _leaves_only(atom):
        return (True, "it leaves the model, as long as what grows") if atom.size[0] == hub else (False, LEAVES_ONLY)
    if _never_read(atom) and atom.size[0] < hub:
        return False, "read by nothing, and less than what grows"
    if "grid" in atom.facts and atom.facts.isdisjoint({"summed", "emitted", "dot"}):
        return False, "the grid that a convolution slides over"
    if "constant" in atom.facts and "emitted" not in atom.facts:
        return False, "of features that no weight makes"
    if atom.size[0] * FAR <= hub:
        return False, f"at least {FAR} times smaller than what grows"
    if atom.size[0] >= hub * FAR:
        return False, f"at least {FAR} times larger than what grows"
    return True, "not far from what grows"


def _choose_factor(axes: Axes, dim: Dim, decided: dict[Atom, tuple[bool, str]], hub: set[Atom], size: int, heads: str) -> None:
    """One factor of a growing product grows: the heads, or with heads="fixed" the head dimension."""
    factors = [list(axes.leaves((atom,))) for atom in dim]
    is_hub = any(atom in hub for leaves in factors for atom in leaves)
    total, *_ = axes.size(dim)
    growing = is_hub or total * FAR > size
    if any(decided[atom][0] for leaves in factors for atom in leaves if atom in decided):
        growing = False
    if not is_hub and all(_leaves_only(atom) for leaves in factors for atom in leaves):
        growing = False
    dotted = [leaves for leaves in factors if any("dot" in atom.facts for atom in leaves)]
    open_ = [leaves for leaves in factors if not all(atom in decided for atom in leaves) and (is_hub or not _anchored(leaves))]
    wanted = sorted(
        open_,
        key=lambda leaves: (
            (leaves in dotted) != (heads == "fixed"),
            _has_fact(leaves, "groups"),
            _has_fact(leaves, "bank"),
            _has_fact(leaves, "repeated") and leaves is not factors[0],  # the heads that share one key, or one B and C of a state space
            _has_fact(leaves, "parts"),
        ),
    )
    chosen = wanted[0] if growing and wanted else []
    for leaves in factors:
        for atom in leaves:
            if atom not in decided:
                if leaves is chosen:
                    why = "head_dim of heads × head_dim, heads fixed" if leaves in dotted else "the outermost factor of a growing product"
                    decided[atom] = True, why
                else:
                    anchor = next((reason for fact, reason in ANCHORS.items() if fact in atom.facts), None)
                    anchor = anchor or (LEAVES_ONLY if _leaves_only(atom) else None)
                    decided[atom] = (
                        False,
                        anchor or ("head_dim of heads × head_dim" if leaves in dotted else "a factor of a product that grows by another"),
                    )


def _anchored(leaves: list[Atom]) -> bool:
    return any(fact in atom.facts for fact in ANCHORS if fact not in {"repeated", "bank", "parts"} for atom in leaves)


def _has_fact(leaves: list[Atom], fact: str) -> bool:
    return any(fact in atom.facts for atom in leaves)


def _classes(axes: Axes, weights: dict, leaves: dict[Atom, sympy.Expr], reasons: dict[Atom, tuple[str, bool]]) -> tuple[AxisClass, ...]:
    where: dict[Atom, dict[tuple[str, int], None]] = {}
    for name, (_, dims) in weights.items():
        for axis, dim in enumerate(dims):
            for atom in axes.leaves(dim):
                where.setdefault(atom, {})[name, axis] = None
    out = [
        AxisClass(
            size=atom.size[0],
            dims=leaves[atom],
            where=tuple(places),
            grows=leaves[atom].has(WIDTH),
            reason=reasons[atom][0],
            known=reasons[atom][1],
        )
        for atom, places in where.items()
    ]
    return tuple(sorted(out, key=lambda c: (not c.grows, -len(c.where))))


def _whole_classes(axes: Axes, weights: dict, products: dict[Dim, sympy.Expr], wholes: dict[Dim, tuple[str, str]]) -> tuple[AxisClass, ...]:
    out = []
    for whole, expression in products.items():
        where = tuple((name, axis) for name, (_, dims) in weights.items() for axis, dim in enumerate(dims) if axes.resolve(dim) == whole)
        size, *_ = axes.size(whole)
        out.append(AxisClass(size=size, dims=expression, where=where, grows=expression.has(WIDTH), reason=wholes[whole][1], known=True))
    return tuple(out)
