"""RULES: how sizes go through every operator, a row for operators that do the same."""

from __future__ import annotations

import torch

from scaling.errors import ScalingError
from scaling.graph import SPLITS, Call
from scaling.operators import rule_of
from scaling.orders import UNKNOWN, Pieces
from scaling.propagation import pointwise as curve
from scaling.propagation import reductions
from scaling.propagation.attention import attention
from scaling.propagation.context import HALF, Context, Result, Rule, Values
from scaling.propagation.contraction import contraction
from scaling.propagation.elementwise import added, merged, multiplied, placed, scattered, zeros
from scaling.propagation.moving import glu, kept, lookup, moves
from scaling.propagation.norms import normalisation
from scaling.propagation.pointwise import clamp, powered, raised, unary
from scaling.propagation.recurrent import recurrent

__all__ = ["MOVES", "RULES", "propagate"]

_ROWS: list[tuple[Rule, str]] = [
    # one entry -> one entry
    (
        unary(curve.same),
        "neg dropout alpha_dropout feature_dropout feature_alpha_dropout nan_to_num real imag "
        "_conj conj conj_physical resolve_conj _neg_view resolve_neg",
    ),
    (unary(curve.positive), "relu leaky_relu abs threshold celu elu selu relu6 hardswish"),
    (unary(curve.odd_bounded), "tanh erf sin atan hardtanh softsign sign asinh"),
    (unary(curve.even_bounded), "sigmoid cos hardsigmoid"),
    (unary(curve.smooth), "gelu silu mish"),
    (unary(curve.softplus), "softplus"),
    (unary(curve.exponential), "exp"),
    (unary(curve.logarithm), "log"),
    (unary(powered(2)), "square"),
    (unary(powered(HALF)), "sqrt"),
    (unary(powered(-HALF)), "rsqrt"),
    (unary(powered(-1)), "reciprocal"),
    (raised, "pow"),
    (clamp, "clamp clamp_min clamp_max"),
    # several values, entry by entry
    (added, "add sub rsub"),
    (multiplied, "mul div multiply divide true_divide _weight_norm"),
    (merged, "where masked_fill maximum minimum copy index_put masked_scatter index_copy scatter scatter_reduce"),
    (scattered, "index_add scatter_add"),
    (placed, "slice_scatter select_scatter"),
    (zeros, "new_zeros zeros_like"),
    # over an axis
    (reductions.summed, "sum nansum"),
    (reductions.cumulated, "cumsum"),
    (reductions.mean, "mean"),
    (reductions.variance, "var"),
    (reductions.deviation, "std"),
    (reductions.extreme, "amax amin max min median logsumexp"),
    (reductions.norm_of, "norm linalg_vector_norm"),
    (reductions.distance, "dist"),
    (reductions.softmax, "softmax _softmax log_softmax _log_softmax"),
    (normalisation, "layer_norm rms_norm batch_norm group_norm instance_norm"),
    (reductions.entropy, "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d binary_cross_entropy binary_cross_entropy_with_logits kl_div"),
    (reductions.difference(2), "mse_loss"),
    (reductions.difference(1), "l1_loss smooth_l1_loss huber_loss"),
    # layers in one operator
    (contraction, "einsum"),
    (attention, "scaled_dot_product_attention"),
    (glu, "glu"),
    (recurrent(curve.odd_bounded), "lstm gru rnn_tanh"),
    (recurrent(curve.positive), "rnn_relu"),
    # values that are picked, or only move
    (lookup, "embedding index index_select gather topk sort"),
    (moves, "view reshape flatten unflatten _unsafe_view _reshape_alias view_as reshape_as ravel permute transpose t mT numpy_T swapaxes"),
    (moves, "swapdims adjoint matrix_H movedim moveaxis unsqueeze squeeze expand expand_as broadcast_to repeat tile repeat_interleave"),
    (moves, "cat concat concatenate stack select slice narrow unbind flip roll tril triu to clone contiguous detach alias type_as rot90"),
    (moves, "pixel_shuffle"),
    # sizes stay as long as no growing axis changes its length
    (kept, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    (kept, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices _adaptive_avg_pool2d cumprod"),
    (kept, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d"),
    (kept, "upsample_trilinear3d pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
]


def _table() -> dict[str, Rule]:
    rows = [(f"aten.{name}", rule) for rule, names in _ROWS for name in names.split()]
    rows += [(name, moves) for name in (*sorted(SPLITS), "getitem")]
    table: dict[str, Rule] = {}
    for name, rule in rows:
        if name in table:
            message = f"two rules for {name!r}"
            raise ScalingError(message)
        table[name] = rule
    return table


RULES: dict[str, Rule] = _table()
"""Operator without overload -> how sizes go through it; what is not here goes by its row of `scaling.operators.OPERATORS`."""

MOVES = {name for name, rule in RULES.items() if rule is moves}
"""Operators that only move values."""


def _rule(call: Call) -> Rule | None:
    if call.name in RULES:
        return RULES[call.name]
    operator = rule_of(call)
    if operator is None or operator.moves is not None:
        return None
    if len([n for n in call.tensors if n is not None]) > 1:
        return contraction
    return unary(curve.generic) if torch.Tag.pointwise in getattr(call.node.target, "tags", ()) else None


def propagate(context: Context, call: Call, values: Values) -> Result:
    """The value of a call, and how its gradient goes back; of unknown size where there is no rule."""
    rule = _rule(call)
    result = rule(context, call, values) if rule is not None else None
    if result is None:
        return Pieces.of(UNKNOWN), lambda _: [None if value is None else Pieces.of(None) for value in values]
    return result
