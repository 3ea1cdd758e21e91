"""Laws of msign, SN and SVC on whatever matrix hypothesis comes up with: any dtype, shape, strides, spectrum and size.

What is expected is computed in fp64 from the SVD of the matrix as it was rounded to its dtype, and bounds follow from what a law says and
from backward errors, not from what was seen: hypothesis would find what lies beyond. The suite takes 50 examples of each; for thousands
`pytest tests/test_laws.py --hypothesis-profile slow`.
"""

import math
from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler import msign, spectral_norm, spectral_normalize, svc
from compiler.coefficients import SCHEDULES
from compiler.errors import NotAMatrix
from compiler.msign import FEWEST_ROWS, polar, power_of_two

LAWS = settings(max_examples=settings.default.max_examples // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow])

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = {torch.float64: 300, torch.float32: 30, torch.bfloat16: 30, torch.float16: 4}
"""Norms are drawn from 10^-this to 10^this."""

ROUNDINGS = 4
"""Of an iteration of 8 to 11 products, of which restarts make the earlier ones good; 10 000 examples of every law need less."""

SPECTRA = {
    "flat": lambda k, g: torch.ones(k),
    "geometric": lambda k, g: torch.logspace(0, -12, k),
    "rank 1": lambda k, g: (torch.arange(k) < 1).float(),
    "rank deficient": lambda k, g: torch.rand(k, generator=g).where(torch.arange(k) <= k // 3, 0),
    "clustered": lambda k, g: torch.where(torch.arange(k) < (k + 1) // 2, 1.0, 1e-3) * (1 + 1e-4 * torch.rand(k, generator=g)),
    "momentum": lambda k, g: torch.exp(-12 * torch.rand(k, generator=g).sort()[0]),
}

LAYOUTS = {
    "contiguous": lambda X: X.clone(),
    "transposed": lambda X: X.mT.clone(memory_format=torch.contiguous_format).mT,
    "every third column": lambda X: X.repeat_interleave(3, -1)[..., ::3],
    "every second row": lambda X: X.repeat_interleave(2, -2)[..., ::2, :],
    "offset": lambda X: torch.nn.functional.pad(X, (3, 2, 1, 4), value=float("nan"))[..., 1 : 1 + X.size(-2), 3 : 3 + X.size(-1)],
    "batch innermost": lambda X: torch.stack([X, X], -1)[..., 1],  # as channels last has it
    "rows expanded": lambda X: X[..., :1, :].expand(X.shape),
    "columns expanded": lambda X: X[..., :1].expand(X.shape),
    "one for the whole batch": lambda X: X[(slice(0, 1),) * (X.ndim - 2)].expand(X.shape),
}


class Drawn(NamedTuple):
    """A matrix, or a batch of them, and the generator it came from."""

    X: torch.Tensor
    generator: torch.Generator

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


@st.composite
def drawn(draw, dtypes=DTYPES, sides=(1, 40)):
    dtype = draw(st.sampled_from(dtypes))
    m, n = draw(st.integers(*sides)), draw(st.integers(*sides))
    lead = draw(st.sampled_from([(), (), (3,), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k, count = min(m, n), math.prod(lead)
    U, V = (torch.linalg.qr(torch.randn(count, side, k, generator=generator, dtype=torch.float64))[0] for side in (m, n))
    spectrum = SPECTRA[draw(st.sampled_from(list(SPECTRA)))]
    S = torch.stack([spectrum(k, generator) * draw(st.sampled_from([1, 1, 1, 0])) for _ in range(count)]).double()
    X = ((U * S[:, None]) @ V.mT).reshape(*lead, m, n)
    if draw(st.booleans()):  # rows, and columns, of all sizes: where rounding does not average out
        X = X * torch.exp(4 * torch.randn(*lead, m, 1, generator=generator, dtype=torch.float64))
    if draw(st.booleans()):
        X = X * torch.exp(4 * torch.randn(*lead, 1, n, generator=generator, dtype=torch.float64))
    size = 10.0 ** draw(st.floats(-SIZES[dtype], SIZES[dtype]))
    X = (X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-300) * size).to(dtype)
    return Drawn(LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](X), generator)


class SVD(NamedTuple):
    """Of X / 2^exponent in fp64, with all singular vectors."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    exponent: torch.Tensor

    @classmethod
    def of(cls, X):
        A, exponent, _ = power_of_two(X.double())
        return cls(*torch.linalg.svd(A, full_matrices=True), exponent)

    def with_values(self, S):
        k = S.size(-1)
        return (self.U[..., :k] * S.unsqueeze(-2)) @ self.Vh[..., :k, :]

    def backward(self):
        """‖E‖₂ of the perturbed matrix whose SVD LAPACK has found, by its manual: p(m, n)·ε·σ₁; largest of a batch, over σ₁."""
        return 8 * max(self.U.size(-1), self.Vh.size(-1)) * torch.finfo(torch.float64).eps


def bits(X):
    """All of the memory behind X."""
    return torch.frombuffer(bytearray(X.untyped_storage().tolist()), dtype=torch.uint8)


def rounded(X):
    """What rounding to X's dtype does to matrices of norm 1 like X at most: ‖E‖₂ ≤ ‖E‖_F ≤ u·‖Y‖_F ≤ u·√min(m, n)."""
    return torch.finfo(X.dtype).eps / 2 * min(X.shape[-2:]) ** 0.5


def working(X):
    """ε of the dtype that X is worked on in."""
    return torch.finfo(torch.promote_types(X.dtype, torch.float32)).eps


@cache
def gain(level):
    """What a level multiplies the smallest singular values by, and with them whatever rounding leaves in a null space."""
    return msign(torch.tensor([[1.0, 0.0], [0.0, 1e-9]], dtype=torch.float64), accuracy=level)[1, 1].item() * 1e9


def iterated(X, level):
    """How far rounding takes the iteration from its polynomial: ROUNDINGS of ε·√max(m, n) (sums of so many terms) times the gain."""
    return ROUNDINGS * working(X) * max(X.shape[-2:]) ** 0.5 * gain(level)


def cut(X, svd):
    """Where "exact" on a CPU cuts, and how far from its polar factor LAPACK may then be: twice the backward error over the gap there."""
    cutoff = max(X.shape[-2:]) * torch.finfo(X.dtype).eps * svd.S[..., :1]
    kept = svd.S.gt(cutoff)
    gap = svd.S.where(kept, math.inf).amin(-1) - svd.S.where(~kept, 0).amax(-1)
    error = (2 * svd.backward() * svd.S[..., 0] / gap).nan_to_num(0).max().item()
    clear = ((svd.S - cutoff).abs() > svd.backward() * svd.S[..., :1]) | (svd.S[..., :1] == 0)
    return kept, error if clear.all() else math.inf


def norm(Y):
    """The largest spectral norm of a batch."""
    return torch.linalg.matrix_norm(Y.double(), 2).max().item()


def signed_permutation(case, X):
    """X -> P·X·Q, exact in every dtype."""
    rows, columns = (torch.randperm(side, generator=case.generator) for side in X.shape[-2:])
    signs = (torch.randint(2, (X.size(-2), 1), generator=case.generator) * 2 - 1).to(X.dtype)
    return lambda Y: (signs * Y)[..., rows, :][..., columns]


def times(X, power):
    """X·2^power where that is exact, else X; and X, both anew: sums are taken in the order of strides."""
    Y, X = X * 2.0**power, X * 1.0
    return (Y if torch.equal(Y * 2.0**-power, X) and Y.isfinite().all() else X), X


@LAWS
@given(case=drawn(), level=st.sampled_from(list(SCHEDULES)), power=st.integers(-20, 20))
def test_msign(case, level, power):
    """U·p(S)·Vᵀ, p as the level has it; ‖Y‖₂ ≤ 1.03; finite; the input untouched; whatever the scale; P·X·Q, -X and Xᵀ alike."""
    X = case.X
    before, svd = bits(X), SVD.of(X)
    Y = msign(X, accuracy=level)
    assert torch.equal(bits(X), before)
    assert (Y.shape, Y.dtype) == (X.shape, X.dtype)
    assert Y.isfinite().all()
    low, high = SCHEDULES[level].image
    assert norm(Y) <= min(1.03, max(1, high) + (1e-12 if level == "exact" else iterated(X, level)) + rounded(X))
    assert torch.equal(*(msign(T, accuracy=level) for T in times(X, power)))
    if level == "exact":
        kept, error = cut(X, svd)
        if error > 0.1:
            return
        close = error + rounded(X)
        assert norm(Y - svd.with_values(kept.double())) <= close
    else:
        close = iterated(X, level) + rounded(X)
        D = svd.U.mT @ Y.double() @ svd.Vh.mT
        d = D.diagonal(dim1=-2, dim2=-1)
        assert norm(D - torch.zeros_like(D).diagonal_scatter(d, dim1=-2, dim2=-1)) <= close
        size = torch.linalg.vector_norm(svd.S, 4, dim=-1, keepdim=True).clamp(min=0.5)  # the largest entry is 1/2 or more, or 0
        inside = svd.S.ge(SCHEDULES[level].lower * size)
        assert (d.where(inside, low) >= low - close).all()
        assert ((d >= -close) & (d <= high + close)).all()
    move = signed_permutation(case, X)
    for other, alike in ((move(X), move(Y)), (-X, -Y), (X.mT, Y.mT), (X.clone(), Y)):
        assert norm(msign(other, accuracy=level).double() - alike.double()) <= 2 * close


@LAWS
@given(case=drawn((torch.float64,)), level=st.sampled_from(list(SCHEDULES)))
def test_msign_commutes_with_orthogonal_maps(case, level):
    """In fp64 alone: rounded to a shorter dtype P·X·Q is another matrix, with other small singular values."""
    X = case.X
    P, Q = (torch.linalg.qr(case.normal(side, side))[0] for side in X.shape[-2:])
    error = 3 * (max(cut(T, SVD.of(T))[1] for T in (X, P @ X @ Q)) if level == "exact" else iterated(X, level))
    if error <= 0.1:
        assert norm(msign(P @ X @ Q, accuracy=level) - P @ msign(X, accuracy=level) @ Q) <= error


@LAWS
@given(case=drawn((torch.float32, torch.bfloat16), (FEWEST_ROWS, 48)), level=st.sampled_from(["fast", "default", "high"]))
def test_msign_in_half_precision(case, level):
    """As on CUDA, where matrices are kept in fp16: ‖Y‖₂ ≤ 1.03, finite, and U·p(S)·Vᵀ where singular values are far above its rounding."""
    X = case.X.reshape(-1, *case.X.shape[-2:])
    A = power_of_two(X.mT if X.size(-2) > X.size(-1) else X)[0].half()
    Y, scale = polar(A.clone(), A.float().square().sum((1, 2)), level)
    Y = Y.float() * scale[:, None, None]
    assert Y.isfinite().all()
    assert norm(Y) <= 1.03


@LAWS
@given(case=drawn(), strict=st.booleans(), power=st.integers(-20, 20))
def test_sn(case, strict, power):
    """X over a number; that is σ₁ but for rounding, or with strict at least σ₁ and at most rank^(1/16) times as much."""
    X = case.X
    before, svd = bits(X), SVD.of(X)
    first, A = svd.S[..., 0], X.double().ldexp(-svd.exponent)
    close, above = 8 * max(X.shape[-2:]) * working(X), min(X.shape[-2:]) ** (1 / 16) if strict else 1
    Y = spectral_normalize(X, strict=strict)
    assert torch.equal(bits(X), before)
    assert (Y.shape, Y.dtype) == (X.shape, X.dtype)
    assert Y.isfinite().all()
    assert norm(Y) <= 1 + rounded(X) + (0 if strict and X.dtype.itemsize > 2 else close)
    share = torch.linalg.matrix_norm(Y.double()) / torch.linalg.matrix_norm(A).clamp(min=0.5)
    assert norm(Y - share[..., None, None] * A) <= 2 * rounded(X) + close
    assert ((share * first * above >= 1 - 2 * rounded(X) - close) | (first == 0)).all()
    assert torch.equal(*(spectral_normalize(T, strict=strict) for T in times(X, power)))
    move = signed_permutation(case, X)
    for other, alike in ((move(X), move(Y)), (-X, -Y), (X.mT, Y.mT), (X.clone(), Y)):
        assert norm(spectral_normalize(other, strict=strict).double() - alike.double()) <= 2 * (rounded(X) + close)
    sigma = spectral_norm(X, strict=strict).double().ldexp(-svd.exponent[..., 0, 0])
    if (X.abs().amax((-2, -1)) > torch.finfo(X.dtype).tiny).all() and sigma.isfinite().all():
        unit = torch.finfo(X.dtype).eps
        assert (sigma >= first * (1 - unit - close)).all()
        assert (sigma <= first * above * (1 + unit + close)).all()


@LAWS
@given(case=drawn(), reach=st.floats(-3, 3), power=st.integers(-20, 20))
def test_svc(case, reach, power):
    """U·min(λ·S, 1)·Vᵀ with λ·σ₁ = 10^reach; all of λ·X where no σ is above 1/λ. It stretches the backward error by λ, no more."""
    X = case.X
    before, svd, ratio = bits(X), SVD.of(X), 10.0**reach
    factor = ratio / svd.S[..., 0].where(svd.S[..., 0] > 0, 1)
    scale = factor.ldexp(-svd.exponent[..., 0, 0].double())
    if not scale.isfinite().all():
        return
    Y = svc(X, scale)
    close = rounded(X) * min(1, ratio) + svd.backward() * ratio + 1e-7 * (X.dtype == torch.float16)  # half of its smallest number each
    assert torch.equal(bits(X), before)
    assert (Y.shape, Y.dtype) == (X.shape, X.dtype)
    assert Y.isfinite().all()
    assert norm(Y) <= min(1, ratio) + rounded(X) + svd.backward()
    assert norm(Y - svd.with_values((factor[..., None] * svd.S).clamp(max=1))) <= close
    if reach < -1e-6:
        assert norm(Y - factor[..., None, None] * X.double().ldexp(-svd.exponent)) <= close
    move = signed_permutation(case, X)
    for other, alike in ((move(X), move(Y)), (-X, -Y), (X.mT, Y.mT), (X.clone(), Y)):
        assert norm(svc(other, scale).double() - alike.double()) <= 2 * close
    moved, still = times(X, power)
    assert torch.equal(svc(moved, scale * 2.0**-power if moved is not still else scale), svc(still, scale))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 4), (0, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "of", [*(lambda X, level=level: msign(X, accuracy=level) for level in SCHEDULES), spectral_normalize, lambda X: svc(X, 2.0)]
)
def test_what_is_empty_stays_so(shape, dtype, of):
    Y = of(torch.zeros(shape, dtype=dtype))
    assert (Y.shape, Y.dtype) == (shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", [msign, spectral_norm, spectral_normalize, lambda X: svc(X, 2.0)])
def test_vectors_and_numbers_are_refused(dtype, of):
    for shape in ((), (1,), (7,), (0,)):
        with pytest.raises(NotAMatrix, match="at least two dimensions"):
            of(torch.zeros(shape, dtype=dtype))
