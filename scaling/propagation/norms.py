"""layer, rms, batch, group and instance norm."""

from __future__ import annotations

from typing import Any

from scaling.graph import Call
from scaling.orders import NOTHING, ZERO, Exponent, Pieces, State, joined, least, minus, plus, zipped
from scaling.propagation.context import Context, Result, Values, largest, shape_of
from scaling.propagation.elementwise import product_of
from scaling.propagation.pointwise import normalised

__all__ = ["normalisation"]


def _place(call: Call, node: Any) -> int | None:
    """Which tensor argument a node is."""
    return next((i for i, n in enumerate(call.tensors) if n is not None and n is node), None)


def normalisation(context: Context, call: Call, values: Values) -> Result | None:
    """layer, rms, batch, group and instance norm, as in training; gain and bias are the operator's own arguments."""
    x = values[0]
    names = {name: _place(call, call.get(name)) for name in ("weight", "bias")}
    if x is None:
        return None
    over_all = joined(x.parts)
    centred = "rms" not in call.name
    size = over_all.init

    def one(part: State) -> State:
        scaled = normalised(over_all, centred=centred)[0]
        if part is over_all or size in {None, NOTHING}:
            return scaled
        return State.of(minus(part.init, size), scaled.mean, least(minus(part.change, size), ZERO), part.roots)

    hat = x.each(one) if len(x.parts) > 1 else Pieces.of(one(over_all))
    gain = values[names["weight"]] if names["weight"] is not None else None
    bias = values[names["bias"]] if names["bias"] is not None else None
    out = hat
    trailing = call.name in {"aten.layer_norm", "aten.rms_norm"}
    for other, combine in ((gain, lambda a, b: product_of(context, a, b, (False, False))), (bias, lambda a, b: joined((a, b)))):
        if other is not None:
            out = zipped(combine, out, other if trailing else Pieces.of(other.whole(joined)), shape_of(call))
    slope = normalised(over_all, centred=centred)[1]

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        back: list[Pieces[Exponent] | None] = [None] * len(values)
        through = ZERO if gain is None else gain.whole(joined).after
        back[0] = d.each(lambda e: plus(e, through, slope))
        for place, factor in ((names["weight"], hat.whole(joined).after), (names["bias"], ZERO)):
            node = call.tensors[place] if place is not None else None
            if place is not None and node is not None:
                extra = context.gathered(max(context.orders(call.node) - context.orders(node), ZERO))
                back[place] = Pieces.of(plus(d.whole(largest), factor, extra))
        return back

    return out, pull
