"""Polynomials by squares: the generator of the short programs in `compiler.coefficients`.

A program takes R = X·Xᵀ, of which it makes Q by N products, each the *square* of the last operand plus multiples of operands at hand:

    L₀ = R,    Lₖ₊₁ = a·Lₖ² + b·Lₖ + d·Lₖ₋₁  (k = 0 … N - 2),    Q = a·L² + b·L + d·R + g·I  (L the last operand)

so that Q·X has the singular values s·q(s²), q of degree 2ᴺ. One symmetric operand, read once, and an epilogue: what
`compiler.kernels.symmetric` computes. On the null space every L is zero and stays so under rounding. The idea
that few products reach a high degree is Paterson & Stockmeyer's (1973, SIAM J. Comput. 2). That squares alone lose nothing was found by
search: with five products min/max of s·q(s²) over [2.88e-3, 1] is 0.135; a search among products of sums gave 0.127 over [3e-3, 1].

`search` finds programs from random starts, `polish` takes one to the nearest local optimum in the maximum norm. Nothing here runs
in a training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Product", "image", "normalized", "polish", "search"]

UNIT = 256.0
"""Operands are stored up to this size: with fp16 in mind, whose numbers below 6e-5 lose digits, as entries of X·Xᵀ with ‖X‖_F = 1 do."""

FLOOR = 0.3
"""What s·q(s²) must reach at least where s is above 1, if that is asked for."""

Product = tuple[float, float, float, float]
"""(a, b, d, g) of one product."""


def _free(products: int) -> Tensor:
    """Which of the (a, b, d, g) of each product may be other than zero."""
    mask = torch.ones(products, 4, dtype=torch.bool)
    mask[:-1, 3] = False
    mask[0, 2] = False
    return mask


def _operands(rows: Tensor, s: Tensor) -> list[Tensor]:
    """R, every L and Q at the points s (G,), for P programs (P, N, 4): shape (P, G) each."""
    L = [(s * s).expand(len(rows), -1)]
    for k in range(rows.size(1)):
        a, b, d, g = rows[:, k].T[..., None]
        L.append(a * L[-1] ** 2 + b * L[-1] + d * L[_other(k, rows.size(1))] + g)
    return L


def _other(k: int, products: int) -> int:
    """Which operand d multiplies in product k: the one before the last, in the final product R."""
    return 0 if k in (0, products - 1) else k - 1


def _errors(rows: Tensor, s: Tensor) -> Tensor:
    """s·q(s²) - 1, shape (P, G); beyond s = 1 as far as it is above 0 or below FLOOR - 1."""
    error = s * _operands(rows, s)[-1] - 1
    return torch.where(s > 1, error.clamp(min=0) + (error + 1 - FLOOR).clamp(max=0), error)


def _slopes(rows: Tensor, s: Tensor) -> Tensor:
    """The derivative of `_errors` by every entry of the programs: (P, 4·N, G)."""
    L, N = _operands(rows, s), rows.size(1)
    T = [torch.zeros(len(rows), 4 * N, len(s), dtype=s.dtype)]
    for k in range(N):
        a, b, d, _ = rows[:, k].T[..., None, None]
        other = _other(k, N)
        t = (2 * a * L[k][:, None] + b) * T[k] + d * T[other]
        for j, entry in enumerate((L[k] ** 2, L[k], L[other], torch.ones_like(L[k]))):
            t[:, 4 * k + j] += entry
        T.append(t)
    return s * T[-1] * _free(N).flatten()[:, None]


def image(program: Sequence[Product], s: Tensor) -> Tensor:
    """The singular values s·q(s²) that s (G,) become."""
    return s * _operands(torch.tensor([program], dtype=s.dtype), s)[-1][0]


def _points(lower: float, count: int) -> Tensor:
    """Half of them evenly, half of them geometrically spaced over [lower, 1]."""
    t = torch.linspace(0, 1, count // 2, dtype=torch.float64)
    return torch.cat([lower + (1 - lower) * t, lower ** (1 - t)]).unique()


def polish(program: Sequence[Product], lower: float, *, held: float = 1.0, steps: int = 300) -> tuple[list[Product], float]:
    """The local optimum of max |s·q(s²) - 1| over [lower, 1] that `program` leads to.

    Levenberg's steps, each the best for the linearised problem in the maximum norm over the present extrema (Lawson 1961).

    Args:
        program: where to start. To reach a `held` far above 1, go there in steps of about 0.01.
        lower: start of the interval.
        held: over (1, held] the image may fall, to FLOOR, but rise as little as over [lower, 1]. Of what rounding makes of a few
            matrices only that much is asked: 20 % cost no more than a longer interval by 12 %.
        steps: at most so many.

    Returns:
        The program, and its error e: min/max of s·q(s²) is (1 - e)/(1 + e).
    """
    rows = torch.tensor([program], dtype=torch.float64)
    s, ridge = _points(lower, 12_000), 1e-3
    if held > 1:
        s = torch.cat([s, torch.linspace(1, held, 1201, dtype=torch.float64)[1:]])
    best = _errors(rows, s).abs().max().item()
    for _ in range(steps):
        error = _errors(rows, s)[0]
        rise = error.diff()
        at = torch.cat([torch.tensor([0]), (rise[1:] * rise[:-1] <= 0).nonzero()[:, 0] + 1, torch.tensor([len(s) - 1])])
        at = at[error[at].abs() > 0.3 * best]
        step = _lawson(error[at], _slopes(rows, s[at])[0].T, ridge).view_as(rows)
        new = _errors(rows + step, s).abs().max().item()
        if new < best:
            gain, best, rows, ridge = best - new, new, rows + step, max(ridge / 3, 1e-14)
            if gain < 1e-10 * best and ridge < 1e-8:
                break
        else:
            ridge *= 8
            if ridge > 1e6:
                break
    return [(a, b, d, g) for a, b, d, g in rows[0].tolist()], best


def _lawson(error: Tensor, slopes: Tensor, ridge: float, rounds: int = 60) -> Tensor:
    """The step that makes max |error + slopes·step| least, by least squares with weights that grow where the residual is large."""
    weights = torch.full_like(error, 1 / len(error))
    damping = ridge * torch.diag(slopes.square().sum(0).clamp(min=1e-12)) / len(error)
    least, best = torch.inf, torch.zeros(slopes.size(1), dtype=error.dtype)
    for _ in range(rounds):
        weighted = weights[:, None] * slopes
        step = -torch.linalg.solve(slopes.T @ weighted + damping, weighted.T @ error)
        residual = (error + slopes @ step).abs()
        if residual.max().item() < least:
            least, best = residual.max().item(), step
        weights = weights * residual
        weights = weights / weights.sum() + 1e-300
    return best


def search(lower: float, products: int, *, seed: int = 0, starts: int = 300, kept: int = 10) -> tuple[list[Product], float]:
    """The best program that `polish` reaches from random starts, which Levenberg-Marquardt in a rising p-norm has sorted out before."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = draw(starts, products, 4) * draw(starts, products, 4).mul(0.5).exp() * _free(products)
    rows = _least_powers(rows, _points(lower, 200), 70, 16)
    s = _points(lower, 4000)
    best = _errors(rows, s).abs().amax(1).nan_to_num(torch.inf).argsort()[: starts // 6]
    rows = torch.cat([rows[best], *(rows[best] * (1 + 0.08 * draw(len(best), products, 4)) for _ in range(3))])
    rows = _least_powers(rows, _points(lower, 300), 40, 24)
    order = _errors(rows, s).abs().amax(1).nan_to_num(torch.inf).argsort()[:kept]
    return min((polish(rows[i].tolist(), lower, steps=150) for i in order), key=lambda found: found[1])


def _least_powers(rows: Tensor, s: Tensor, steps: int, power: float) -> Tensor:
    """P programs at once towards the least sum of |error|^p, p rising from 2 to `power`."""
    damping = torch.full((len(rows), 1), 1e-2, dtype=s.dtype)
    for step in range(steps):
        p = 2 * (power / 2) ** min(1, step / (0.7 * steps))

        def size(rows: Tensor, p: float = p) -> Tensor:
            error = _errors(rows, s).abs().nan_to_num(1e6, 1e6, 1e6).clamp(max=1e6)
            largest = error.amax(1, keepdim=True).clamp(min=1e-300)
            return (largest * ((error / largest) ** p).mean(1, keepdim=True) ** (1 / p))[:, 0]

        error, slopes = _errors(rows, s), _slopes(rows, s)
        weights = (error.abs() / error.abs().amax(1, keepdim=True).clamp(min=1e-300)) ** (p - 2)
        normal = torch.einsum("pig,pg,pjg->pij", slopes, weights, slopes).nan_to_num(0, 0, 0)
        towards = torch.einsum("pig,pg->pi", slopes, weights * error).nan_to_num(0, 0, 0)
        normal += torch.diag_embed(normal.diagonal(dim1=1, dim2=2).clamp(min=1e-12) * damping)
        new = rows - (torch.linalg.solve(normal, towards) / max(1, p - 1) ** 0.5).view_as(rows)
        better = size(new) < size(rows)
        rows = torch.where(better[:, None, None], new, rows)
        damping = torch.where(better[:, None], damping / 2.5, damping * 4).clamp(1e-13, 1e8)
    return rows


def normalized(program: Sequence[Product], *, upper: float, scale: float) -> tuple[Product, ...]:
    """The same polynomial for s in [lower·upper, upper] instead of [lower, 1], times `scale`, as `compiler.msign` runs it.

    There R is UNIT·X·Xᵀ, and the units of the other operands are chosen so that every |L| ≤ UNIT where s ≤ upper.
    """
    s = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    L = [x[0] for x in _operands(torch.tensor([program], dtype=torch.float64), s)]
    units = [UNIT * upper**2, *(UNIT / x.abs().max().item() for x in L[1:-1]), scale / upper]
    out = []
    for k, (a, b, d, g) in enumerate(program):
        new, last, other = units[k + 1], units[k], units[_other(k, len(program))]
        out.append((a * new / (last * last), b * new / last, d * new / other, g * new))
    return tuple(out)
