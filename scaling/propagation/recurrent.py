"""lstm, gru, rnn, and their cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import fx

from scaling.graph import Call
from scaling.orders import ZERO, Exponent, Pieces, State, joined, plus, top
from scaling.propagation.context import Context, Curve, Result, Rule, Values, largest
from scaling.propagation.contraction import contract, handed_back

__all__ = ["recurrent"]


def recurrent(bounded: Curve) -> Rule:
    """lstm, gru, rnn: h = f(W_ih·x + W_hh·h + b) over a finite number of steps; gates are Θ(1) (THEORY 2.2, row 29)."""

    def rule(context: Context, call: Call, values: Values) -> Result | None:
        params = call.get("params")
        biases = call.get("has_biases")
        nodes = [n for n in params if isinstance(n, fx.Node)] if isinstance(params, (list, tuple)) else []
        count = 4 if biases else 2
        given = dict(zip(call.tensors, values, strict=True))
        states = [v.whole(joined) for n in nodes if (v := given.get(n)) is not None]
        x = values[0]
        if x is None or not nodes or len(nodes) % count or len(states) != len(nodes):
            return None
        directions = 2 if call.get("bidirectional") else 1
        below, cells = x.whole(joined), []
        for first in range(0, len(nodes), count * directions):
            layer = [_Cell.of(context, nodes, states, at, count, below, bounded) for at in range(first, first + count * directions, count)]
            cells.append(layer)
            below = joined([cell.hidden for cell in layer])

        def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
            back: dict[fx.Node, Exponent] = {}
            e = d.whole(largest)
            for layer in reversed(cells):
                for cell in layer:
                    back |= dict(zip(nodes[cell.at : cell.at + count], cell.handed_back(context, e), strict=False))
                e = top(*(cell.to_input(context, e) for cell in layer))
            back[call.tensors[0]] = e  # pyright: ignore[reportArgumentType]
            return [Pieces.of(back[n]) if n in back else None for n in call.tensors]  # pyright: ignore[reportArgumentType]

        return Pieces.of(below), pull

    return rule


@dataclass(frozen=True)
class _Cell:
    """One layer of a recurrent operator in one direction: its matrices with the powers of d in their columns and rows."""

    at: int
    matrices: tuple[tuple[State, Fraction, Fraction], ...]
    given: tuple[State, State]
    hidden: State

    @classmethod
    def of(
        cls, context: Context, nodes: Sequence[fx.Node], states: Sequence[State], at: int, count: int, x: State, bounded: Curve
    ) -> _Cell:
        """The cell of the weights from `at` on."""
        matrices = []
        for node, state in zip(nodes[at : at + 2], states[at : at + 2], strict=True):
            rows, columns = (context.order(dim) for dim in context.dims(node))
            matrices.append((state, columns, rows))
        (w, columns, rows), (u, own, _) = matrices
        parts = [contract(x, w, columns, ZERO, rows), *states[at + 2 : at + count]]
        begun = bounded(joined(parts))[0]
        hidden = bounded(joined([*parts, contract(begun, u, own, ZERO, rows)]))[0]  # as in every later step
        return cls(at, tuple(matrices), (x, hidden), hidden)

    def handed_back(self, context: Context, d: Exponent) -> list[Exponent]:
        """The gradients of W_ih, W_hh and the biases."""
        d = self.through_time(context, d)
        return [plus(d, self.given[0].after), plus(d, self.given[1].after), d, d]

    def through_time(self, context: Context, d: Exponent) -> Exponent:
        """The gradient of the sums inside, from all steps."""
        matrix, columns, rows = self.matrices[1]
        return top(d, plus(d, handed_back(context, matrix, rows, columns)))

    def to_input(self, context: Context, d: Exponent) -> Exponent:
        """The gradient of the input."""
        matrix, columns, rows = self.matrices[0]
        return plus(self.through_time(context, d), handed_back(context, matrix, rows, columns))
