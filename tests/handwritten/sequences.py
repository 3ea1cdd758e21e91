"""Recurrence, state spaces, audio, sets and time."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .model import Handwritten, between, floats, tokens

RNN = "hidden: inner.*weight*\nvector: inner.*bias*"


class Recurrent(nn.Module):
    def __init__(self, d, kind, **options):
        super().__init__()
        self.rnn = kind(d, d, batch_first=True, **options)

    def forward(self, x):
        return self.rnn(x)[0]


class BothWays(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.rnn, self.mix = nn.GRU(d, d, 2, batch_first=True, bidirectional=True), nn.Linear(2 * d, d)

    def forward(self, x):
        return self.mix(self.rnn(x)[0])


class Packed(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(11, d), nn.LSTM(d, d, batch_first=True), nn.Linear(d, 3)

    def forward(self, ids, lengths):
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(output[:, 0])


class Cells(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(d, d), nn.GRUCell(d, d), nn.RNNCell(d, d)

    def forward(self, x):
        h, c = self.lstm(x[:, 0])
        out = []
        for t in range(1, x.shape[1]):
            h, c = self.lstm(x[:, t], (h, c))
            h = self.rnn(x[:, t], self.gru(x[:, t], h))
            out.append(h)
        return torch.stack(out, 1)


class HandGRU(nn.Module):
    """A GRU by hand, gates fused in one weight."""

    def __init__(self, d):
        super().__init__()
        self.x, self.h = nn.Linear(d, 3 * d), nn.Linear(d, 3 * d, bias=False)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            r, z, n = self.x(x[:, t]).chunk(3, -1)
            hr, hz, hn = self.h(h).chunk(3, -1)
            z = torch.sigmoid(z + hz)
            h = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h
        return h[:, None]


class Mamba(nn.Module):
    def __init__(self, d, state=4, rank=2):
        super().__init__()
        e = 2 * d
        self.rank, self.state = rank, state
        self.inward, self.conv = nn.Linear(d, 2 * e, bias=False), nn.Conv1d(e, e, 4, groups=e, padding=3)
        self.x_proj, self.dt_proj, self.outward = (
            nn.Linear(e, rank + 2 * state, bias=False),
            nn.Linear(rank, e),
            nn.Linear(e, d, bias=False),
        )
        self.A_log, self.D = nn.Parameter(torch.zeros(e, state)), nn.Parameter(torch.ones(e))

    def forward(self, x):
        x, z = self.inward(x).chunk(2, -1)
        x = F.silu(self.conv(x.mT)[..., : x.shape[1]].mT)
        dt, B, C = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        dt = F.softplus(self.dt_proj(dt))
        A = -torch.exp(self.A_log)
        h, out = torch.zeros(x.shape[0], x.shape[2], self.state), []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
            out.append((h * C[:, t, None]).sum(-1))
        return self.outward((torch.stack(out, 1) + self.D * x) * F.silu(z))


class LongConvolution(nn.Module):
    """A convolution over the whole sequence by FFT (S4D, Hyena), with a filter per channel."""

    def __init__(self, d, length=6):
        super().__init__()
        self.filter, self.mix = nn.Parameter(torch.zeros(d, length)), nn.Linear(d, d)

    def forward(self, x):
        n = 2 * x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n) * torch.fft.rfft(self.filter, n), n)[..., : x.shape[1]]
        return self.mix(F.gelu(y.mT))


class WaveNet(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, d, 1), nn.Conv1d(d, 5, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(d, 2 * d, 2, dilation=2**i, padding=2**i) for i in range(2))
        self.residual, self.skip = nn.ModuleList(nn.Conv1d(d, d, 1) for _ in range(2)), nn.ModuleList(nn.Conv1d(d, d, 1) for _ in range(2))

    def forward(self, x):
        x, skips = self.first(x), 0
        for dilated, residual, skip in zip(self.dilated, self.residual, self.skip, strict=True):
            a, b = dilated(x)[..., : x.shape[-1]].chunk(2, 1)
            h = torch.tanh(a) * torch.sigmoid(b)
            x, skips = x + residual(h), skips + skip(h)
        return self.last(F.relu(skips))


class TimeMixing(nn.Module):
    """RWKV: a decay and a mix per channel."""

    def __init__(self, d):
        super().__init__()
        self.mix, self.decay, self.bonus = (nn.Parameter(torch.zeros(d)) for _ in range(3))
        self.k, self.v, self.r, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x):
        shifted = F.pad(x, (0, 0, 1, -1))
        mixed = x * self.mix + shifted * (1 - self.mix)
        k, v, r = torch.exp(self.k(mixed)), self.v(mixed), torch.sigmoid(self.r(mixed))
        top, bottom, out = torch.zeros_like(v[:, 0]), torch.zeros_like(v[:, 0]), []
        for t in range(x.shape[1]):
            now = torch.exp(self.bonus) * k[:, t]
            out.append((top + now * v[:, t]) / (bottom + now + 1e-6))
            top, bottom = (torch.exp(-torch.exp(self.decay)) * s + u for s, u in ((top, k[:, t] * v[:, t]), (bottom, k[:, t])))
        return self.o(r * torch.stack(out, 1))


class Sinusoids(nn.Module):
    """Time of a diffusion step: fixed sinusoids, then a small MLP, added to every token."""

    def __init__(self, d):
        super().__init__()
        self.up, self.down, self.body = nn.Linear(8, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        t = torch.arange(x.shape[0]).float()
        angles = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(4) / 4)
        time = self.down(F.silu(self.up(torch.cat([angles.sin(), angles.cos()], -1))))
        return self.body(x + time[:, None])


class NeuralODE(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.field = nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))

    def forward(self, x):
        for _ in range(3):
            k1 = self.field(x)
            x = x + 0.1 * self.field(x + 0.05 * k1)
        return x


class FixedPoint(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.W = nn.Linear(d, d)

    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in range(20):
            new = torch.tanh(self.W(z) + x)
            if (new - z).norm() < 1e-3:
                break
            z = new
        return z


class PointerNetwork(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.embed, self.rnn, self.query, self.key, self.score = (
            nn.Linear(2, d),
            nn.LSTM(d, d, batch_first=True),
            nn.Linear(d, d),
            nn.Linear(d, d),
            nn.Linear(d, 1),
        )

    def forward(self, points):
        h, (last, _) = self.rnn(self.embed(points))
        return self.score(torch.tanh(self.key(h) + self.query(last[-1])[:, None])).squeeze(-1).log_softmax(-1)


class Memory(nn.Module):
    """A memory of learned slots, read by similarity."""

    def __init__(self, d, slots=9):
        super().__init__()
        self.keys, self.values, self.query = nn.Parameter(torch.zeros(slots, d)), nn.Parameter(torch.zeros(slots, d)), nn.Linear(d, d)

    def forward(self, x):
        return F.softmax(self.query(x) @ self.keys.T, -1) @ self.values


SEQUENCES = {
    "lstm": between(lambda d: Recurrent(d, nn.LSTM), roles=RNN),
    "gru_two_layers": between(lambda d: Recurrent(d, nn.GRU, num_layers=2), roles=RNN),
    "elman_relu": between(lambda d: Recurrent(d, nn.RNN, nonlinearity="relu"), roles=RNN),
    "bidirectional_gru": between(BothWays, roles=RNN),
    "recurrent_cells": between(Cells, roles=RNN),
    "gru_by_hand": between(HandGRU, roles=RNN),
    "packed_lstm": Handwritten(
        Packed,
        lambda d: (tokens(3, 6), torch.tensor([6, 2, 4])),
        "embedding: embed.weight\nhidden: rnn.weight*\noutput: out.weight\nscalar: out.bias\nvector: rnn.bias*",
    ),
    "mamba": between(
        Mamba,
        roles="hidden: inner.inward.weight inner.outward.weight\noutput: inner.x_proj.weight\ninput: inner.dt_proj.weight\nvector: inner.*",
    ),
    "long_convolution": between(LongConvolution, roles="hidden: inner.mix.weight\nvector: inner.*"),
    "wavenet": Handwritten(
        WaveNet,
        lambda d: (floats(2, 3, 16),),
        "input: first.weight\noutput: last.weight\nscalar: last.bias\nhidden: *weight\nvector: *bias",
        unreached=(),
    ),
    "time_mixing": between(TimeMixing, roles="hidden: inner.*.weight\nvector: inner.*"),
    "sinusoidal_time": between(Sinusoids, roles="input: inner.up.weight\nhidden: inner.*.weight\nvector: inner.*.bias"),
    "neural_ode": between(NeuralODE, roles="hidden: inner.*.weight\nvector: inner.*.bias"),
    "fixed_point": between(FixedPoint, roles="hidden: inner.*.weight\nvector: inner.*.bias"),
    "pointer_network": Handwritten(
        PointerNetwork,
        lambda d: (floats(2, 6, 2),),
        "input: embed.weight\nhidden: rnn.weight* query.weight key.weight\noutput: score.weight\nscalar: score.bias\nvector: *bias*",
    ),
    "memory_slots": between(Memory, roles="hidden: inner.query.weight\nvector: inner.query.bias\noutput: inner.keys\ninput: inner.values"),
}
