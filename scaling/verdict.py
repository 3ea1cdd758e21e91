"""What `verify` returns: every proof obligation, proven or failed, and how it is written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import NamedTuple

import sympy
from pydantic import ValidationError

from scaling.departures import Departure, Step
from scaling.errors import FormatError
from scaling.formats import LATEX
from scaling.limits import WIDTH, leading
from scaling.notation import formula
from scaling.parametrizations import class_of
from scaling.records import Exact, Record
from scaling.regimes import REGIMES

__all__ = ["STATEMENTS", "Departure", "Obligation", "Statement", "Verdict"]


class Statement(NamedTuple):
    """What an obligation claims of two sides, for a terminal and for LaTeX; ≍ is "of the same order as d → ∞"."""

    text: str
    latex: str


_TARGET = r"\frac{s_y}{s_x}\sqrt{\frac{n_{\rm out}}{n_{\rm in}}}"

STATEMENTS: dict[str, Statement] = {
    "init": Statement(
        "‖m·W‖₂ ≈ m·σ·(√fan_in + √fan_out) ≍ (s_y/s_x)·√(fan_out/fan_in)",
        rf"\|mW\|_2 \approx m\sigma(\sqrt{{n_{{\rm in}}}}+\sqrt{{n_{{\rm out}}}}) \asymp {_TARGET}",
    ),
    "update": Statement("‖m·ΔW‖₂ = m·η·‖U‖₂ ≍ (s_y/s_x)·√(fan_out/fan_in)", rf"\|m\,\Delta W\|_2 = m\eta\|U\|_2 \asymp {_TARGET}"),
    "mean": Statement("the entries of W have mean 0", r"\mathrm{E}\,W_{ij} = 0"),
    "epsilon": Statement(
        "ε ≍ m·s_x/(s_y·copies·fan_out), the entries of the gradient",
        r"\varepsilon \asymp \frac{m\,s_x}{s_y\,n_{\rm copies}\,n_{\rm out}} \asymp |G_{ij}|",
    ),
    "clip": Statement("λ·‖G‖₂ ≍ 1, of the gradient whose singular values are clipped at 1", r"\lambda\,\|G\|_2 \asymp 1"),
    "decay": Statement("η·λ ≍ 1, the fraction decayed per step", r"\eta\lambda \asymp 1"),
    "contraction": Statement(
        "a sum of products of two trained activations over dim has the factor 1/dim",
        r"\mathrm{factor\ on}\ \sum_{i\le n} q_i k_i \asymp 1/n",
    ),
    "stream": Statement(
        "β is at most of the order 1/√L: L branches times β, independent at init, add up (1/L where they share their weights)",
        r"\beta = O(1/\sqrt{L}) \mathrm{\ as\ } L \to \infty",
    ),
    "changes": Statement(
        "in L: ‖m·ΔW‖₂ ≍ (s_y/s_x)·√(fan_out/fan_in)/(L·β), as the changes of L branches add up; without L·β outside of them",
        rf"L\,\beta\,\|m\,\Delta W\|_2 \asymp {_TARGET} \mathrm{{\ as\ }} L \to \infty",
    ),
    "deep eps": Statement("in L: ε ≍ the entries of the gradient, which carries β", r"\varepsilon \asymp \beta\,|G_{ij}|"),
    "deep decay": Statement("in L: η·λ ≍ 1", r"\eta\lambda \asymp 1 \mathrm{\ as\ } L \to \infty"),
    "coverage": Statement("the weight is reached by a rule", r"\mathrm{the\ weight\ is\ reached\ by\ a\ rule}"),
    "same init": Statement("I1: m·σ ≍ m'·σ'", r"m\sigma \asymp m'\sigma'"),
    "same update": Statement("I2: m^(1+p)·η ≍ m'^(1+p)·η'", r"m^{1+p}\eta \asymp m'^{1+p}\eta'"),
    "same relative update": Statement("I2: m·σ·η ≍ m'·σ'·η'", r"m\sigma\eta \asymp m'\sigma'\eta'"),
    "same epsilon": Statement("ε/m ≍ ε'/m'", r"\varepsilon/m \asymp \varepsilon'/m'"),
    "same clip": Statement("m·λ ≍ m'·λ'", r"m\lambda \asymp m'\lambda'"),
    "same decay": Statement("η·λ ≍ η'·λ'", r"\eta\lambda \asymp \eta'\lambda'"),
    "same tie": Statement("the multipliers of two uses have the ratio m₂/m₁ ≍ m₂'/m₁'", r"m_2/m_1 \asymp m_2'/m_1'"),
}
"""Obligation -> what it claims (THEORY 3.4; Yang et al. 2023, arXiv 2310.17813, condition 1; Yang & Hu 2021, arXiv 2011.14522, eq. 5)."""


class Obligation(Record):
    """One thing that has to hold, for one part of one weight, or for all the `names` of which repeated blocks have it.

    Proven iff lhs/rhs tends to a constant that is neither 0 nor ∞: `excess`, the power of d it follows (of L, in depth), is 0.
    """

    name: str
    weight: str
    statement: str
    lhs: Exact | None
    rhs: Exact | None
    proven: bool
    by: str
    excess: Exact = sympy.Integer(0)
    names: tuple[str, ...] = ()
    where: str = ""
    cure: str = ""


class Verdict(Record):
    """Whether a parametrization is equivalent to another: true iff every obligation is proven.

    `verdict` is its own regime, a name of `scaling.regimes.REGIMES`, and `r` the power of 1/d by which features move less than in muP.
    `departures`: where it fails, the first value of the model that blows up and the first that vanishes.
    """

    model: str
    parametrization: str
    against: str
    optimizer: str
    verdict: str
    r: Exact
    weights: int
    obligations: tuple[Obligation, ...]
    departures: tuple[Departure, ...] = ()

    def __bool__(self) -> bool:
        return all(one.proven for one in self.obligations)

    @property
    def failed(self) -> tuple[Obligation, ...]:
        """The obligations that do not hold, in model order."""
        return tuple(one for one in self.obligations if not one.proven)

    @property
    def cures(self) -> tuple[str, ...]:
        """One line per fault: of which weights, what is missing, what it does, where; ε and decay come last."""
        faults: dict[str, list[Obligation]] = {}
        for one in sorted(self.failed, key=lambda one: one.name.removeprefix("same ") in {"epsilon", "decay", "clip"}):
            faults.setdefault(one.cure or f"{one.name} does not hold: {one.by}", []).append(one)
        return tuple(_fault(cure, group) for cure, group in faults.items())

    @property
    def claim(self) -> str:
        """The verdict in one sentence."""
        known = "is proven equivalent to" if self else "is not equivalent to"
        against = "muP" if self.against == "mup" else self.against
        return f"under {self.optimizer}, {self.parametrization} of {self.model or 'the model'} {known} {against}"

    @property
    def assumes(self) -> tuple[str, ...]:
        """How large the updates of its optimizers are, which is all that the proof takes from them."""
        own = self.optimizer.split("+")
        return tuple(f"{name}: {class_of(name).says}" for name in own)

    @property
    def concludes(self) -> str:
        """What follows from the obligations, if they are proven."""
        if self.against == "mup":
            return (
                "Hence every map keeps the size of what it is given, at init and in every step, which is the spectral condition "
                "(Yang et al. 2023, arXiv 2310.17813, condition 1), and thereby muP"
            )
        return (
            "Hence all invariants of the abc symmetry agree up to constants: the two differ by a shift that leaves training as it is "
            "(Yang et al. 2022, arXiv 2203.03466, lemma J.1)"
        )

    @property
    def count(self) -> str:
        """How many obligations there are and how many fail."""
        state = f"{len(self.failed)} failed" if self.failed else "all proven"
        return f"{len(self.obligations)} distinct obligations for {self.weights} weights, {state}"

    def to_text(self) -> str:
        """The proof for a terminal."""
        out = [_sentence(self.claim), f"  {REGIMES[self.verdict]}; r = {self.r}", f"  {self.count}"]
        if self.cures:
            out += ["What is wrong", *(f"  {line}" for line in self.cures)]
        out += [line for one in self.departures for line in _departure(one)]
        out += ["Updates", *(f"  {line}" for line in self.assumes), "Obligations (≍: the ratio tends to a constant)"]
        out += [f"  {name.removeprefix('same ')}: {STATEMENTS[name].text}" for name in dict.fromkeys(one.name for one in self.obligations)]
        for weight, obligations in _by_weight(self.obligations):
            out += [weight, *(f"  {'✓' if one.proven else '✗'} {_line(one)}" for one in obligations)]
        return "\n".join([*out, *([f"{self.concludes}."] if self else [])])

    def to_markdown(self) -> str:
        """The proof as GitHub-flavoured Markdown."""
        out = [f"**{_sentence(self.claim)}**", "", f"{REGIMES[self.verdict]}; r = {self.r}. {self.count}.", ""]
        out += [f"- {line}" for line in self.cures] + [""] * bool(self.cures)
        for one in self.departures:
            steps = (f"`{step.source.code}` {step.where}: {step.name}, {step.sizes}" for step in one.path)
            out += [f"{_sentence(one.headline)}. {SIZES}:", "", *(f"{i}. {step}" for i, step in enumerate(steps, 1)), ""]
            out += [f"Cure: {one.cure}", ""] if one.cure else []
        out += [f"- updates, {line}" for line in self.assumes]
        out += [f"- *{name}*: {STATEMENTS[name].text}" for name in dict.fromkeys(one.name for one in self.obligations)]
        out += ["", "| weight | obligation | left | right | proven | by |", "|---|---|---|---|---|---|"]
        for one in self.obligations:
            sides = (_side(one.lhs), _side(one.rhs))
            cells = (f"`{one.weight}`", one.name, *sides, "yes" if one.proven else "**no**", one.by)
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(out) + "\n"

    def to_latex(self) -> str:
        """The proof in LaTeX, to be pasted; needs no package."""
        title = "Proposition" if self else "Not proven"
        claim, regime = _words(_sentence(self.claim)), _words(REGIMES[self.verdict])
        out = [rf"\noindent\textbf{{{title}.}} {claim}. Its regime: {regime}; $r = {sympy.latex(self.r)}$."]
        if self.cures:
            out += ["", r"\medskip\noindent\textbf{What is wrong.}", *_items(map(_words, self.cures))]
        for one in self.departures:
            steps = (
                rf"\texttt{{{_words(step.source.code)}}} ({_words(step.where)}): {_words(step.name)}, "
                f"{_words(step.sizes)}"
                for step in one.path
            )
            cure = [rf"Cure: {_words(one.cure)}."] if one.cure else []
            out += ["", rf"\medskip\noindent\textbf{{{_words(_sentence(one.headline))}.}} {SIZES}:", *_items(steps), *cure]
        legend = [rf"\emph{{{_words(name)}}}: ${STATEMENTS[name].latex}$" for name in dict.fromkeys(one.name for one in self.obligations)]
        out += [
            "",
            r"\medskip\noindent\textbf{Proof.} Every weight is used as $y = mWx$ with $n_{\rm in}$ terms summed into each of $n_{\rm out}$",
            r"outputs, $W_{ij} \sim N(0, \sigma^2)$ and learning rate $\eta$; $d$ is the width, and $f \asymp g$ says that $f/g$ tends",
            r"to a positive constant as $d \to \infty$. Of the updates $U$ only their size matters;",
            f"{_words('; '.join(self.assumes))}. To be shown:",
            *_items(legend),
            "In turn:",
            *_items(
                rf"\texttt{{{_words(weight)}}}: " + "; ".join(map(_latex, group)) + "." for weight, group in _by_weight(self.obligations)
            ),
        ]
        return "\n".join([*out, *([rf"{_words(self.concludes)}. \hfill\rule{{1.2ex}}{{1.2ex}}"] if self else [])]) + "\n"

    def to_json(self, indent: int | None = 2) -> str:
        """The verdict as JSON; `from_json` gives back an equal one."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Verdict:
        """The verdict that `to_json` wrote.

        Raises:
            FormatError: if the text is none.
        """
        try:
            return cls.model_validate_json(text)
        except (ValidationError, SyntaxError) as error:
            where = f"{text[:40]!r}…"
            raise FormatError(where, f"it is no verdict ({str(error).splitlines()[0]})") from error

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def _departure(one: Departure) -> list[str]:
    """Its headline, its path with the sizes along it, its cure."""
    cure = [f"  cure: {one.cure}"] if one.cure else []
    return [_sentence(one.headline), f"  {SIZES[:1].lower()}{SIZES[1:]}:", *(f"  {_step(step)}" for step in one.path), *cure]


def _step(step: Step) -> str:
    return f"{step.where}  {step.name}  ({step.sizes})  {step.source.code}"


SIZES = "The path to it, with the size of each value (at init, of its change)"

SHOWN = 4  # weights of one fault that are named before "and 9 more"


def _fault(cure: str, group: list[Obligation]) -> str:
    weights = list(dict.fromkeys(one.weight for one in group))
    places = [one.where for one in group if one.where]
    more = f" and {len(weights) - SHOWN} more" if len(weights) > SHOWN else ""
    return f"{', '.join(weights[:SHOWN])}{more}: {cure}" + (f", {places[0]}" if places else "")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _by_weight(obligations: Iterable[Obligation]) -> list[tuple[str, list[Obligation]]]:
    return [(weight, list(group)) for weight, group in groupby(obligations, lambda one: one.weight)]


def _side(value: sympy.Expr | None) -> str:
    return "" if value is None else formula(value)


def _line(one: Obligation) -> str:
    sides = (
        ""
        if one.lhs is None or one.rhs is None or one.lhs == one.rhs == 0
        else f"{formula(one.lhs)} {'≍' if one.proven else '≭'} {formula(one.rhs)}"
    )
    return f"{one.name.removeprefix('same '):<12}" + "  ".join(part for part in (sides, f"[{one.by}]") if part)


def _latex(one: Obligation) -> str:
    name = rf"\emph{{{_words(one.name)}}} "
    if one.lhs is None or one.rhs is None or one.lhs == 0 or one.rhs == 0:
        return name + _words(one.by)
    constant, power = leading(one.lhs / one.rhs)
    limit = rf"\to {sympy.latex(constant)}" if power == 0 else rf"\sim {sympy.latex(constant * WIDTH**power)}"
    return name + rf"$({sympy.latex(one.lhs)})\,/\,({sympy.latex(one.rhs)}) {limit}$"


def _items(lines: Iterable[str]) -> list[str]:
    return [r"\begin{itemize}\raggedright", *(rf"\item{{}} {line}" for line in lines), r"\end{itemize}"]


_EXTRA = {"≍": r"$\asymp$", "Δ": r"$\Delta$", "₂": "$_2$", "₁": "$_1$", "≈": r"$\approx$", "⁻": "$^-$", "✓": "", "✗": ""}
_EXTRA |= {char: f"$^{digit}$" for digit, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}


def _words(text: str) -> str:
    table: dict[str, str] = {**LATEX, **_EXTRA}
    return "".join(table.get(char, char) for char in text)


FORMATS: dict[str, Callable[[Verdict], str]] = {
    "text": Verdict.to_text,
    "markdown": Verdict.to_markdown,
    "latex": Verdict.to_latex,
    "json": Verdict.to_json,
}
"""Name -> the proof as text in that format."""
