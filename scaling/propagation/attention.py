"""scaled_dot_product_attention: logits, softmax over tokens, values."""

from __future__ import annotations

from torch import fx

from scaling.graph import Call
from scaling.operators import bind
from scaling.orders import NOTHING, ZERO, Exponent, Pieces, State, joined, least, plus, top
from scaling.propagation.context import HALF, Context, Result, Values, largest
from scaling.propagation.contraction import contract, handed_back

__all__ = ["attention"]


def attention(context: Context, call: Call, values: Values) -> Result | None:
    """softmax(scale·q·k) v over tokens: what q·k of a growing head is, is kept in `Context.logits`."""
    bound = bind(call, context.growth.axes)
    if bound is None or any(value is None for value in values[:3]):
        return None
    q, k, v = (value.whole(joined) for value in values[:3] if value is not None)
    letters = [{label.name: context.order(dim) for axis in b.axes for label, dim in axis} for b in bound[0][:3]]
    summed, values_of, repeats = letters[0].get("e", ZERO), letters[2].get("f", ZERO), letters[0].get("r", ZERO)
    keys = letters[1].get("s", ZERO)
    if keys:
        return None
    scale = _scale(context, call)
    logits = contract(q, k, summed, ZERO, ZERO).scaled(scale)
    out = State.of(v.init, v.mean, top(v.change, plus(v.init, least(logits.change, ZERO))), v.roots)

    context.logits[call.node] = logits, NOTHING

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        e = d.whole(largest)
        context.logits[call.node] = logits, plus(e, handed_back(context, v, values_of, ZERO))
        to_logits = plus(context.logits[call.node][1], scale)
        shared_heads = context.gathered(repeats)
        to_q, to_k = plus(to_logits, k.after), plus(to_logits, q.after, shared_heads)
        return [Pieces.of(to_q), Pieces.of(to_k), Pieces.of(plus(e, shared_heads)), *(None for _ in values[3:])]

    return Pieces.of(out), pull


def _scale(context: Context, call: Call) -> Exponent:
    """The power of d in attention's scale; left out it is 1/√(the last axis of q)."""
    query = [node.args[0] for node in call.nodes]
    sizes = tuple(int(node.meta["val"].shape[-1]) for node in query if isinstance(node, fx.Node))
    given = call.over_widths("scale")
    if all(scale is None for scale in given):
        node = call.tensors[0]
        return -HALF * context.order(context.dims(node)[-1]) if node is not None else None
    return context.power([float(s) if s is not None else n**-0.5 for s, n in zip(given, sizes, strict=True)], [sizes])
