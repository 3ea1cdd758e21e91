"""Every row of OPERATORS, held against the operator itself: change one entry of an input, see which entries of the output move."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scaling.capture import record
from scaling.errors import ScalingError
from scaling.graph import align
from scaling.operators import OPERATORS, Operator, parse, register
from scaling.uses import joined_axes

R = torch.randn


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def recurrent(gates, hidden=3, inputs=4):
    """Two states, W_ih, W_hh and two biases."""
    return R(1, 2, hidden), R(1, 2, hidden), R(gates * hidden, inputs), R(gates * hidden, hidden), R(gates * hidden), R(gates * hidden)


FOURIER = ("fft", "ifft", "rfft", "irfft", "hfft", "fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn")

CLASSES = torch.tensor([[0, 1, 2], [4, 3, 0]])

EXAMPLES = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (R(2, 3), R(4, 3), R(4))),
    "matmul": (torch.matmul, (R(2, 5, 3), R(2, 3, 4))),
    "mm": (torch.mm, (R(5, 3), R(3, 4))),
    "bmm": (torch.bmm, (R(2, 5, 3), R(2, 3, 4))),
    "mv": (torch.mv, (R(5, 3), R(3))),
    "dot": (torch.dot, (R(3), R(3))),
    "vdot": (torch.vdot, (R(3), R(3))),
    "inner": (torch.inner, (R(2, 5, 3), R(4, 3))),
    "addmm": (torch.addmm, (R(4), R(2, 3), R(3, 4))),
    "baddbmm": (torch.baddbmm, (R(2, 5, 4), R(2, 5, 3), R(2, 3, 4))),
    "einsum": (lambda a, b: torch.einsum("bcd,edf->bef", a, b), (R(2, 5, 3), R(4, 3, 6))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([2, -2], [-1, 0])), (R(2, 5, 3), R(5, 4, 3))),
    "linalg_inv": (lambda a: torch.linalg.inv(a + 5 * torch.eye(3)), (R(3, 3),)),
    "inverse": (lambda a: torch.ops.aten.inverse(a + 5 * torch.eye(3)), (R(3, 3),)),
    "linalg_householder_product": (torch.linalg.householder_product, (R(4, 3), R(3))),
    "matrix_exp": (torch.matrix_exp, (R(3, 3),)),
    "linalg_qr": (lambda a: torch.linalg.qr(a)[0], (R(4, 3),)),
    "diagonal": (lambda x: x.diagonal(dim1=2, dim2=0), (R(3, 2, 4),)),
    "addbmm": (torch.addbmm, (R(5, 4), R(2, 5, 3), R(2, 3, 4))),
    "addmv": (torch.addmv, (R(5), R(5, 3), R(3))),
    "addr": (torch.addr, (R(5, 3), R(5), R(3))),
    "trace": (torch.trace, (R(3, 3),)),
    "diag_embed": (torch.diag_embed, (R(2, 3),)),
    "conv_tbc": (torch.conv_tbc, (R(5, 2, 3), R(3, 3, 4), R(4))),
    "linalg_cross": (torch.linalg.cross, (R(4, 3), R(4, 3))),
    "linalg_cholesky_ex": (lambda a: torch.linalg.cholesky_ex(a @ a.T + torch.eye(3))[0], (R(3, 3),)),
    "linalg_inv_ex": (lambda a: torch.linalg.inv_ex(a + 5 * torch.eye(3))[0], (R(3, 3),)),
    "outer": (torch.outer, (R(3), R(4))),
    "ger": (torch.ger, (R(3), R(4))),
    "bilinear": (F.bilinear, (R(2, 3), R(2, 4), R(5, 3, 4), R(5))),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, groups=2), (R(2, 4, 9), R(6, 2, 3), R(6))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2), (R(2, 3, 9, 8), R(4, 3, 3, 3), R(4))),
    "convolution": (lambda x, w, b: torch.convolution(x, w, b, [2], [0], [1], True, [0], 2), (R(2, 4, 5), R(4, 3, 2), R(6))),
    "native_layer_norm": (lambda x, w, b: torch.native_layer_norm(x, (3,), w, b, 1e-5)[0], (R(2, 3), R(3), R(3))),
    "native_group_norm": (lambda x, w, b: torch.native_group_norm(x, w, b, 2, 4, 5, 2, 1e-5)[0], (R(2, 4, 5), R(4), R(4))),
    "native_batch_norm": (
        lambda x, w, b, m, v: torch.native_batch_norm(x, w, b, m, v * v, False, 0.1, 1e-5)[0],
        (R(2, 3, 4), R(3), R(3), R(3), R(3)),
    ),
    "conv3d": (F.conv3d, (R(1, 2, 5, 5, 5), R(3, 2, 3, 3, 3), R(3))),
    "conv_transpose1d": (F.conv_transpose1d, (R(2, 3, 5), R(3, 4, 3), R(4))),
    "conv_transpose2d": (lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2), (R(2, 4, 5, 5), R(4, 3, 2, 2), R(6))),
    "conv_transpose3d": (F.conv_transpose3d, (R(1, 2, 3, 3, 3), R(2, 3, 2, 2, 2), R(3))),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, (R(2, 3, 5, 4), R(2, 3, 7, 4), R(2, 3, 7, 6), R(3, 5, 7))),
    "_grouped_mm": (lambda x, w: torch.ops.aten._grouped_mm(x, w, torch.tensor([2, 6], dtype=torch.int32)), (R(6, 8), R(2, 8, 4))),
    "lstm": (lambda x, h, c, *w: torch._VF.lstm(x, (h, c), w, True, 1, 0.0, False, False, True)[0], (R(2, 3, 4), *recurrent(4))),
    "gru": (lambda x, h, _, *w: torch._VF.gru(x, h, w, True, 1, 0.0, False, False, True)[0], (R(2, 3, 4), *recurrent(3))),
    "rnn_tanh": (lambda x, h, _, *w: torch._VF.rnn_tanh(x, h, w, True, 1, 0.0, False, False, True)[0], (R(2, 3, 4), *recurrent(1))),
    "rnn_relu": (lambda x, h, _, *w: torch._VF.rnn_relu(x, h, w, True, 1, 0.0, False, False, True)[0], (R(2, 3, 4), *recurrent(1))),
    "lstm_cell": (lambda x, h, c, *w: torch._VF.lstm_cell(x, (h[0], c[0]), *w), (R(2, 4), *recurrent(4))),
    "gru_cell": (lambda x, h, _, *w: torch._VF.gru_cell(x, h[0], *w), (R(2, 4), *recurrent(3))),
    "rnn_tanh_cell": (lambda x, h, _, *w: torch._VF.rnn_tanh_cell(x, h[0], *w), (R(2, 4), *recurrent(1))),
    "rnn_relu_cell": (lambda x, h, _, *w: torch._VF.rnn_relu_cell(x, h[0], *w), (R(2, 4), *recurrent(1))),
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 3], [1, 1]]), w), (R(5, 3),)),
    "embedding_bag": (lambda w: torch.embedding_bag(w, torch.tensor([0, 3, 1, 1]), torch.tensor([0, 2]), mode=0)[0], (R(5, 3),)),
    "_sparse_mm": (lambda x: torch.sparse.mm(torch.eye(4).to_sparse(), x), (R(4, 3),)),
    "linalg_solve": (lambda a, b: torch.linalg.solve(a + 5 * torch.eye(3), b), (R(3, 3), R(3, 4))),
    "linalg_solve_triangular": (
        lambda a, b: torch.linalg.solve_triangular(a.tril() + 5 * torch.eye(3), b, upper=False, left=False),
        (R(3, 3), R(4, 3)),
    ),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), (R(2, 3), R(3), R(3))),
    "rms_norm": (lambda x, w: F.rms_norm(x, (3,), w), (R(2, 3), R(3))),
    "batch_norm": (lambda x, w, b, m, v: F.batch_norm(x, m, v * v, w, b), (R(2, 3, 4), R(3), R(3), R(3), R(3))),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (R(2, 3, 4), R(3), R(3))),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (R(2, 4, 5), R(4), R(4))),
    "_weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), (R(3, 4), R(3, 1))),
    "prelu": (F.prelu, (R(2, 3, 4), R(3))),
    "add": (torch.add, (R(2, 3), R(3))),
    "sub": (torch.sub, (R(2, 3), R(3))),
    "rsub": (torch.rsub, (R(2, 3), R(3))),
    "mul": (torch.mul, (R(2, 1, 3), R(4, 1))),
    "div": (torch.div, (R(2, 3), R(3))),
    "multiply": (torch.multiply, (R(2, 3), R(3))),
    "divide": (torch.divide, (R(2, 3), R(3))),
    "true_divide": (torch.true_divide, (R(2, 3), R(3))),
    "neg": (torch.neg, (R(2, 3),)),
    "real": (lambda x: torch.real(torch.complex(x, 2 * x)), (R(2, 3),)),
    "_conj": (lambda x: torch.imag(torch.complex(x, 2 * x).conj()), (R(2, 3),)),
    "conj": (lambda x: torch.imag(torch.ops.aten.conj(torch.complex(x, 2 * x))), (R(2, 3),)),
    "resolve_conj": (lambda x: torch.imag(torch.resolve_conj(torch.complex(x, 2 * x).conj())), (R(2, 3),)),
    "_neg_view": (lambda x: torch._neg_view(x), (R(2, 3),)),
    "resolve_neg": (lambda x: torch.resolve_neg(torch._neg_view(x)), (R(2, 3),)),
    "complex": (lambda x, y: torch.real(torch.complex(x, y)), (R(2, 3), R(2, 3))),
    "polar": (lambda x, y: torch.imag(torch.polar(x, y)), (R(2, 3), R(2, 3))),
    "view_as_real": (lambda x, y: torch.view_as_real(torch.complex(x, y)), (R(2, 3), R(2, 3))),
    "view_as_complex": (lambda x: torch.real(torch.view_as_complex(x)), (R(4, 3, 2),)),
    "imag": (lambda x: torch.imag(torch.complex(x, 2 * x)), (R(2, 3),)),
    "softmax": (lambda x: x.softmax(-1), (R(2, 3),)),
    "_softmax": (lambda x: torch._softmax(x, -1, False), (R(2, 3),)),
    "log_softmax": (lambda x: x.log_softmax(-1), (R(2, 3),)),
    "_log_softmax": (lambda x: torch._log_softmax(x, -1, False), (R(2, 3),)),
    "log_sigmoid_forward": (F.logsigmoid, (R(2, 3),)),
    "renorm": (lambda x: x.renorm(2, 0, 1.0), (R(2, 3),)),
    "where": (lambda x, y: torch.where(torch.tensor([True, False, True]), x, y), (R(2, 3), R(3))),
    "masked_fill": (lambda x: x.masked_fill(torch.tensor([True, False, False]), 0.0), (R(2, 3),)),
    "hardtanh": (F.hardtanh, (R(2, 3),)),
    "relu6": (torch.ops.aten.relu6, (R(2, 3),)),
    "softplus": (F.softplus, (R(2, 3),)),
    "gelu": (F.gelu, (R(2, 3),)),
    "silu": (F.silu, (R(2, 3),)),
    "mish": (F.mish, (R(2, 3),)),
    "hardswish": (F.hardswish, (R(2, 3),)),
    "dropout": (lambda x: F.dropout(x, 0.0, training=False), (R(2, 3),)),
    "feature_dropout": (lambda x: torch.feature_dropout_(x + 0, 0.0, train=False), (R(2, 3, 2),)),
    "alpha_dropout": (lambda x: torch.alpha_dropout_(x + 0, 0.0, train=False), (R(2, 3),)),
    "feature_alpha_dropout": (lambda x: torch.feature_alpha_dropout(x, 0.0, train=False), (R(2, 3, 2),)),
    "view": (lambda x: x.view(2, 2, 3, 5), (R(2, 6, 5),)),
    "reshape": (lambda x: x.reshape(4, 3, 5), (R(2, 6, 5),)),
    "flatten": (lambda x: x.flatten(1), (R(2, 6, 5),)),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)), (R(2, 6, 5),)),
    "ravel": (torch.ravel, (R(2, 3),)),
    "view_as": (lambda x, y: x.view_as(y), (R(6, 4), R(2, 3, 4))),
    "reshape_as": (lambda x, y: x.reshape_as(y), (R(6, 4), R(2, 3, 4))),
    "_unsafe_view": (lambda x: torch.ops.aten._unsafe_view(x, [2, 12]), (R(2, 3, 4),)),
    "_reshape_alias": (lambda x: torch.ops.aten._reshape_alias(x, [2, 12], [12, 1]), (R(2, 3, 4),)),
    "permute": (lambda x: x.permute(2, 0, 1), (R(2, 3, 4),)),
    "transpose": (lambda x: x.transpose(0, 2), (R(2, 3, 4),)),
    "t": (torch.t, (R(2, 3),)),
    "mT": (lambda x: x.mT, (R(2, 3, 4),)),
    "mH": (lambda x: x.mH, (R(2, 3, 4),)),
    "numpy_T": (lambda x: torch.ops.aten.numpy_T(x), (R(2, 3),)),
    "swapaxes": (lambda x: x.swapaxes(0, 1), (R(2, 3),)),
    "swapdims": (lambda x: x.swapdims(0, 1), (R(2, 3),)),
    "adjoint": (torch.adjoint, (R(2, 3, 4),)),
    "matrix_H": (lambda x: x.H, (R(2, 3),)),
    "movedim": (lambda x: x.movedim(0, 2), (R(2, 3, 4),)),
    "moveaxis": (lambda x: x.moveaxis((0, 1), (2, 0)), (R(2, 3, 4),)),
    "unsqueeze": (lambda x: x.unsqueeze(1), (R(2, 3),)),
    "squeeze": (lambda x: x.squeeze(1), (R(2, 1, 3),)),
    "expand": (lambda x: x.expand(5, 2, 4, 3), (R(2, 1, 3),)),
    "expand_as": (lambda x, y: x.expand_as(y), (R(2, 1), R(2, 3))),
    "broadcast_to": (lambda x: x.broadcast_to(4, 3), (R(1, 3),)),
    "repeat": (lambda x: x.repeat(2, 3), (R(2, 3),)),
    "tile": (lambda x: x.tile(2, 2), (R(2, 3),)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=1), (R(2, 3),)),
    "cat": (lambda x, y: torch.cat([x, y], 1), (R(2, 3), R(2, 4))),
    "concat": (lambda x, y: torch.concat([x, y], 1), (R(2, 3), R(2, 4))),
    "concatenate": (lambda x, y: torch.concatenate([x, y], 1), (R(2, 3), R(2, 4))),
    "stack": (lambda x, y: torch.stack([x, y], 1), (R(2, 3), R(2, 3))),
    "select": (lambda x: x.select(1, 2), (R(2, 3, 4),)),
    "slice": (lambda x: x[:, 1:3], (R(2, 4),)),
    "narrow": (lambda x: x.narrow(1, 1, 2), (R(2, 4),)),
    "split": (lambda x: x.split(2, 1), (R(2, 5),)),
    "split_with_sizes": (lambda x: x.split([2, 3], 1), (R(2, 5),)),
    "chunk": (lambda x: x.chunk(2, 1), (R(2, 6),)),
    "tensor_split": (lambda x: x.tensor_split(2, 1), (R(2, 6),)),
    "unsafe_chunk": (lambda x: x.unsafe_chunk(2, 1), (R(2, 6),)),
    "unsafe_split": (lambda x: x.unsafe_split(2, 1), (R(2, 6),)),
    "unsafe_split_with_sizes": (lambda x: torch.unsafe_split_with_sizes(x, [2, 3], 1), (R(2, 5),)),
    "unbind": (lambda x: x.unbind(1), (R(2, 3),)),
    "flip": (lambda x: x.flip(0), (R(3, 3),)),
    "roll": (lambda x: x.roll(1, 0), (R(3, 3),)),
    "cumsum": (lambda x: x.cumsum(0), (R(3, 3),)),
    "cumprod": (lambda x: x.cumprod(0), (R(3, 3),)),
    "cummax": (lambda x: x.cummax(0)[0], (R(3, 3),)),
    "cummin": (lambda x: x.cummin(0)[0], (R(3, 3),)),
    "logcumsumexp": (lambda x: x.logcumsumexp(0), (R(3, 3),)),
    "index_fill": (lambda x: x.index_fill(0, torch.tensor([1]), 2.0), (R(3, 2),)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (R(2, 6, 3),)),
    "_pack_padded_sequence": (lambda x: torch.nn.utils.rnn.pack_padded_sequence(x, [4, 3], batch_first=True).data, (R(2, 4, 5),)),
    "_pad_packed_sequence": (
        lambda x: torch._VF._pad_packed_sequence(x, torch.tensor([2, 2, 1]), False, 0.0, 3)[0],
        (R(5, 3),),
    ),
    "tril": (torch.tril, (R(3, 3),)),
    "triu": (torch.triu, (R(3, 3),)),
    "nan_to_num": (torch.nan_to_num, (R(3, 3),)),
    "rot90": (lambda x: torch.rot90(x, 2), (R(3, 4),)),
    "fill": (lambda x: torch.fill(x, 1.0), (R(3, 3),)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (R(2, 12, 3, 5),)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (R(2, 3, 4, 6),)),
    "im2col": (lambda x: F.unfold(x, 2), (R(1, 3, 4, 4),)),
    "col2im": (lambda x: F.fold(x, (3, 3), 2), (R(1, 12, 4),)),
    "unfold": (lambda x: x.unfold(1, 2, 1), (R(2, 4, 3),)),
    "index": (lambda x: x[:, torch.tensor([0, 2])], (R(2, 3, 4),)),
    "_unsafe_index": (lambda x: torch.ops.aten._unsafe_index(x, [None, torch.tensor([0, 2])]), (R(2, 3, 4),)),
    "index_reduce": (lambda x, y: x.index_reduce(0, torch.tensor([0]), y, "mean"), (R(2, 3), R(1, 3))),
    "index_select": (lambda x: x.index_select(1, torch.tensor([0, 2])), (R(2, 3),)),
    "copy": (lambda x, y: torch.ops.aten.copy(x, y), (R(2, 3), R(2, 3))),
    "index_put": (lambda x, y: x.index_put((torch.tensor([0]),), y), (R(2, 3), R(3))),
    "index_add": (lambda x, y: x.index_add(0, torch.tensor([0]), y), (R(2, 3), R(1, 3))),
    "index_copy": (lambda x, y: x.index_copy(0, torch.tensor([0]), y), (R(2, 3), R(1, 3))),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y, 0, 0, 1), (R(2, 3), R(1, 3))),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, 0, 0), (R(2, 3), R(3))),
    "masked_scatter": (lambda x, y: x.masked_scatter(torch.ones(2, 3, dtype=torch.bool), y), (R(2, 3), R(2, 3))),
    "sum": (lambda x: x.sum(1), (R(2, 3, 4),)),
    "mean": (lambda x: x.mean(-1, keepdim=True), (R(2, 3, 4),)),
    "amax": (lambda x: x.amax(1), (R(2, 3),)),
    "amin": (lambda x: x.amin(1), (R(2, 3),)),
    "max": (lambda x: x.max(1).values, (R(2, 3),)),
    "min": (lambda x: x.min(1).values, (R(2, 3),)),
    "median": (lambda x: x.median(1).values, (R(2, 3),)),
    "nanmedian": (lambda x: x.nanmedian(1).values, (R(2, 3),)),
    "kthvalue": (lambda x: x.kthvalue(2, 1).values, (R(2, 3),)),
    "mode": (lambda x: x.mode(1).values, (R(2, 3),)),
    "aminmax": (lambda x: torch.aminmax(x, dim=1), (R(2, 3),)),
    "nansum": (lambda x: x.nansum(1), (R(2, 3),)),
    "var": (lambda x: x.var(1), (R(2, 3),)),
    "std": (lambda x: x.std(1), (R(2, 3),)),
    "norm": (lambda x: torch.ops.aten.norm(x, 2, [1]), (R(2, 3),)),
    "linalg_vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (R(2, 3),)),
    "logsumexp": (lambda x: x.logsumexp(1), (R(2, 3),)),
    "prod": (lambda x: x.prod(1), (R(2, 3),)),
    "var_mean": (lambda x: torch.var_mean(x, 1), (R(2, 3),)),
    "std_mean": (lambda x: torch.std_mean(x, 1), (R(2, 3),)),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (R(2, 3, 6),)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (R(2, 3, 6, 6),)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), (R(2, 3, 4, 4, 4),)),
    "max_pool2d_with_indices": (lambda x: torch.ops.aten.max_pool2d_with_indices(x, [2, 2])[0], (R(2, 3, 6, 6),)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (R(2, 3, 6),)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (R(2, 3, 6, 6),)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (R(2, 3, 4, 4, 4),)),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 2), (R(2, 3, 6),)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), (R(2, 3, 6, 6),)),
    "_adaptive_avg_pool2d": (lambda x: torch._adaptive_avg_pool2d(x, [2, 2]), (R(2, 3, 6, 6),)),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 2), (R(2, 3, 4, 4, 4),)),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 2), (R(2, 3, 6),)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), (R(2, 3, 6, 6),)),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 2), (R(2, 3, 4, 4, 4),)),
    "fractional_max_pool2d": (
        lambda x: F.fractional_max_pool2d(x, 2, output_size=2, _random_samples=torch.full((2, 3, 2), 0.5)),
        (R(2, 3, 4, 4),),
    ),
    "max_unpool2d": (lambda x: F.max_unpool2d(x, torch.zeros(2, 3, 2, 2, dtype=torch.long), 2), (R(2, 3, 2, 2),)),
    "upsample_nearest1d": (lambda x: F.interpolate(x, scale_factor=2), (R(2, 3, 4),)),
    "upsample_nearest2d": (lambda x: F.interpolate(x, scale_factor=2), (R(2, 3, 4, 4),)),
    "upsample_nearest3d": (lambda x: F.interpolate(x, scale_factor=2), (R(1, 2, 3, 3, 3),)),
    "upsample_bilinear2d": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (R(2, 3, 4, 4),)),
    "upsample_bicubic2d": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), (R(2, 3, 4, 4),)),
    "upsample_linear1d": (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), (R(2, 3, 4),)),
    "upsample_trilinear3d": (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), (R(1, 2, 3, 3, 3),)),
    "grid_sampler": (lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2), align_corners=False), (R(2, 3, 4, 4),)),
    "pad": (lambda x: F.pad(x, (1, 1)), (R(2, 3),)),
    "constant_pad_nd": (lambda x: torch.constant_pad_nd(x, (1, 1)), (R(2, 3),)),
    "reflection_pad1d": (lambda x: torch.ops.aten.reflection_pad1d(x, [1, 1]), (R(2, 3, 4),)),
    "reflection_pad2d": (lambda x: torch.ops.aten.reflection_pad2d(x, [1, 1, 1, 1]), (R(2, 3, 4, 4),)),
    "replication_pad1d": (lambda x: torch.ops.aten.replication_pad1d(x, [1, 1]), (R(2, 3, 4),)),
    "replication_pad2d": (lambda x: torch.ops.aten.replication_pad2d(x, [1, 1, 1, 1]), (R(2, 3, 4, 4),)),
    "reflection_pad3d": (lambda x: torch.ops.aten.reflection_pad3d(x, [1] * 6), (R(1, 2, 3, 3, 3),)),
    "replication_pad3d": (lambda x: torch.ops.aten.replication_pad3d(x, [1] * 6), (R(1, 2, 3, 3, 3),)),
    "_upsample_nearest_exact1d": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), (R(2, 3, 4),)),
    "_upsample_nearest_exact2d": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), (R(2, 3, 4, 4),)),
    "_upsample_bilinear2d_aa": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", antialias=True), (R(2, 3, 4, 4),)),
    "_upsample_bicubic2d_aa": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True), (R(2, 3, 4, 4),)),
    **{f"fft_{name}": (getattr(torch.fft, name), (R(2, 3, 4),)) for name in FOURIER},
    "_fft_r2c": (lambda x: torch.fft.rfftn(x, dim=(1, 2)), (R(2, 3, 4),)),
    "_fft_c2r": (lambda x: torch.fft.irfftn(torch.complex(x, x), dim=(1, 2)), (R(2, 3, 4),)),
    "_fft_c2c": (lambda x: torch.fft.ihfftn(x, dim=(1, 2)), (R(2, 3, 4),)),
    "topk": (lambda x: x.topk(2, 1).values, (R(2, 5),)),
    "sort": (lambda x: x.sort(1).values, (R(2, 5),)),
    "gather": (lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1]])), (R(2, 5),)),
    "scatter": (lambda x, y: x.scatter(1, torch.tensor([[0, 2], [1, 3]]), y), (R(2, 5), R(2, 2))),
    "scatter_add": (lambda x, y: x.scatter_add(1, torch.tensor([[0, 2], [1, 3]]), y), (R(2, 5), R(2, 2))),
    "scatter_reduce": (lambda x, y: x.scatter_reduce(1, torch.tensor([[0, 2], [1, 3]]), y, "sum"), (R(2, 5), R(2, 2))),
    "take_along_dim": (lambda x: x.take_along_dim(torch.tensor([[0, 2], [1, 1]]), 1), (R(2, 5),)),
    "glu": (lambda x: F.glu(x, 1), (R(2, 6),)),
    "cross_entropy_loss": (lambda x: F.cross_entropy(x, CLASSES, reduction="none"), (R(2, 5, 3),)),
    "nll_loss": (lambda x: torch.ops.aten.nll_loss(x, CLASSES[:, 0], None, 0), (R(2, 5),)),
    "nll_loss_nd": (lambda x: F.nll_loss(x, CLASSES, reduction="none"), (R(2, 5, 3),)),
    "nll_loss2d": (lambda x: torch.ops.aten.nll_loss2d(x, CLASSES[..., None], None, 0), (R(2, 5, 3, 1),)),
    "multi_margin_loss": (lambda x: torch.ops.aten.multi_margin_loss(x, CLASSES[:, 0], 1, 1.0, None, 0), (R(2, 5),)),
    "_ctc_loss": (
        lambda x: torch._ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2], [1, 1]]), [8, 8], [2, 2], 0, False)[0],
        (R(8, 2, 5),),
    ),
    "dist": (torch.dist, (R(2, 3), R(2, 3))),
    **{
        name: (lambda x, y, loss=loss: loss(x.sigmoid(), y.sigmoid(), reduction="none"), (R(2, 3), R(2, 3)))
        for name, loss in {
            "mse_loss": F.mse_loss,
            "l1_loss": F.l1_loss,
            "smooth_l1_loss": F.smooth_l1_loss,
            "huber_loss": F.huber_loss,
            "binary_cross_entropy": F.binary_cross_entropy,
            "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
            "kl_div": F.kl_div,
            "poisson_nll_loss": F.poisson_nll_loss,
            "soft_margin_loss": F.soft_margin_loss,
        }.items()
    },
}
NO_VALUES = {
    "aten.grouped_mm": "the public name of _grouped_mm",
    **dict.fromkeys(
        [f"aten.{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")]
        + [f"aten.new_{kind}" for kind in ("zeros", "ones", "empty", "full")]
        + [f"aten.{kind}" for kind in ("bernoulli", "normal", "uniform", "exponential", "geometric", "cauchy", "log_normal", "random")],
        "makes a new value",
    ),
    "aten.as_strided": "windows that overlap: no axis is known to be the same",
    "torchvision.deform_conv2d": "needs torchvision",
    "torchvision.roi_align": "needs torchvision",
    "torchvision.roi_pool": "needs torchvision",
    "getitem": "every operator with several outputs is an example of it",
    "aten.to": "hands its input on: no node",
    "aten.clone": "hands its input on: no node",
    "aten.contiguous": "hands its input on: no node",
    "aten.detach": "hands its input on: no node",
    "aten.alias": "hands its input on: no node",
    "aten.type_as": "hands its input on: no node",
    "aten.native_dropout": "draws a mask",
    "aten.dropout": "hands its input on in eval mode: no node",
    "aten.any": "bools are not recorded",
    "aten.all": "bools are not recorded",
    "aten.argmax": "ints are not recorded",
    "aten.zero": "no value of the input is left",
}


def coordinates(axes, dim, at):
    """The index on every class that entry `at` of an axis has."""
    out = {}
    for atom in reversed(axes.resolve(dim)):
        at, inner = divmod(at, atom.size[0])
        if not atom.segments:
            out[atom] = inner
        for segment in atom.segments:
            if segment.start[0] <= inner < segment.stop[0]:
                out |= coordinates(axes, segment.dim, inner - segment.start[0])
    return out


def places(axes, dims, index):
    return {key: value for dim, at in zip(dims, index, strict=True) for key, value in coordinates(axes, dim, at).items()}


def outputs_of(function, inputs):
    with torch.no_grad():
        result = function(*(x.clone() for x in inputs))
    return list(result) if isinstance(result, (tuple, list)) else [result]


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_entry_moves_only_outputs_with_its_own_index_on_every_shared_axis(name):
    function, inputs = EXAMPLES[name]
    graph = align([record(Calls(function), inputs, {})], ["once"])
    axes, without = joined_axes(graph)
    assert any(call.name == f"aten.{name}" for call in graph.calls.values()) or f"aten.{name}" in NO_VALUES, [
        c.name for c in graph.calls.values()
    ]
    assert not without
    placeholders = [node for node in graph.calls if node.op == "placeholder"]
    before = outputs_of(function, inputs)
    shared = False
    for node, tensor, k in zip(placeholders, inputs, itertools.count()):
        for index in itertools.product(*map(range, tensor.shape)):
            changed = [x.clone() for x in inputs]
            changed[k][index] += 1.0
            here = places(axes, axes.dims[node], index)
            for value, after, old in zip(graph.outputs, outputs_of(function, changed), before, strict=True):
                for moved in (after != old).nonzero().tolist():
                    there = places(axes, axes.dims[value], moved)
                    common = here.keys() & there.keys()
                    shared |= bool(common)
                    if name in PERMUTED:
                        continue
                    assert all(here[atom] == there[atom] for atom in common), (index, moved)
    assert shared or not before[0].dim() or name in UNSHARED


PERMUTED = {
    *(f"fft_{name}" for name in FOURIER),
    "_fft_c2c",
    "_fft_c2r",
    "_fft_r2c",
    "_log_softmax",
    "channel_shuffle",
    "cummax",
    "cummin",
    "linalg_cholesky_ex",
    "linalg_cross",
    "linalg_inv_ex",
    "logcumsumexp",
    "max_unpool2d",
    "renorm",
    "_softmax",
    "_weight_norm",
    "cumprod",
    "cumsum",
    "flip",
    "group_norm",
    "gru",
    "gru_cell",
    "index_put",
    "instance_norm",
    "layer_norm",
    "inverse",
    "linalg_householder_product",
    "linalg_inv",
    "linalg_qr",
    "linalg_solve",
    "linalg_solve_triangular",
    "log_softmax",
    "lstm",
    "matrix_exp",
    "native_group_norm",
    "native_layer_norm",
    "lstm_cell",
    "reflection_pad1d",
    "rms_norm",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "roll",
    "rot90",
    "select_scatter",
    "slice_scatter",
    "softmax",
    "sort",
}
"""These keep an axis but mix or move its indices: the same dimension, other entries."""
UNSHARED = {"fill"}
"""No value, or no axis, of the input is left."""


def test_every_operator_of_the_table_has_an_example():
    assert set(OPERATORS) == {f"aten.{name}" for name in EXAMPLES} | set(NO_VALUES)


def test_an_operator_can_be_registered_once_and_only_with_a_signature():
    with pytest.raises(ScalingError, match="has a rule already"):
        register("aten.linear", "... i, o i -> ... o")
    with pytest.raises(ScalingError, match="a signature has one '->'"):
        register("mylib.scan", "b t c")
    with pytest.raises(ScalingError, match="not an axis"):
        parse("b t*c -> b")
    register("mylib.scan", "b t c, c -> b t c")
    assert isinstance(OPERATORS.pop("mylib.scan"), Operator)
