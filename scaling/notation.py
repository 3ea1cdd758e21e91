"""How an exact expression, a name and a sentence are written: one text of pieces, which every output format sets in its own way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from math import gcd
from typing import Any

import sympy

from scaling.limits import WIDTH

__all__ = ["Code", "Text", "decided", "formula", "join", "plain", "render"]


class Code(str):
    """A weight's name or a line of the user's file: set in a fixed pitch."""

    __slots__ = ()


Text = tuple[str | Code | sympy.Expr, ...]
"""A sentence: words, code and formulas."""

HALF = sympy.Rational(1, 2)
ONE_LETTER = re.compile(r"[^\W\d_](?![A-Za-z_])")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render(text: Text, words: Callable[[str], str], code: Callable[[str], str], math: Callable[[sympy.Expr], str]) -> str:
    """The text in one format, given how that format writes words, code and formulas."""
    return "".join(
        math(piece) if isinstance(piece, sympy.Expr) else code(piece) if isinstance(piece, Code) else words(piece) for piece in text
    )


def plain(text: Text) -> str:
    """The text in Unicode, for a terminal."""
    return render(text, str, str, formula)


def join(separator: str, texts: Iterable[Text]) -> Text:
    """The texts in one, as `str.join`."""
    pieces = [piece for text in texts for piece in (separator, *text)]
    return tuple(pieces[1:])


@cache
def decided(expression: sympy.Expr) -> sympy.Expr:
    """The expression with each min and max decided that has one answer at every width d ≥ 1: √(min(1, 4d)) is 1.

    >>> d = WIDTH
    >>> decided(sympy.Min(1, 4 * d)), decided(sympy.Min(1, 65 / d))
    (1, Min(1, 65/d))
    """
    beyond = sympy.Symbol("beyond", nonnegative=True)
    choices: dict[Any, Any] = {choice: choice.subs(WIDTH, 1 + beyond) for choice in expression.atoms(sympy.Min, sympy.Max)}
    answers = {choice: at.subs(beyond, WIDTH - 1) for choice, at in choices.items() if not at.has(sympy.Min, sympy.Max)}
    out: Any = expression.xreplace(answers)
    return out


@cache
def formula(expression: sympy.Expr) -> str:
    """The expression as a reader of papers would write it on one line. Exact: nothing is evaluated or rounded.

    >>> d = sympy.Symbol("d", positive=True)
    >>> print(formula(sympy.sqrt(sympy.Min(1, 65 / d) / d)), formula(1 / (4 * sympy.sqrt(d))), formula(3 * d + 64), sep="  ")
    √(min(1, 65/d)/d)  1/(4√d)  3d + 64
    """
    if isinstance(expression, sympy.Add):
        return _sum(expression)
    if isinstance(expression, (sympy.Min, sympy.Max)):
        return f"{type(expression).__name__.lower()}({', '.join(sorted(map(formula, expression.args)))})"
    if isinstance(expression, (sympy.Mul, sympy.Pow, sympy.Rational)):
        return _product(expression)
    return str(expression)


def _sum(expression: sympy.Expr) -> str:
    terms: Any = expression.as_ordered_terms()
    first, *others = terms
    return formula(first) + "".join(f" - {formula(-term)}" if term.could_extract_minus_sign() else f" + {formula(term)}" for term in others)


def _product(expression: sympy.Expr) -> str:
    """A quotient of two products, all square roots of which stand under one sign: √(65/d), not √65/√d."""
    coefficient, factors = expression.as_coeff_mul()
    numerator, denominator = sympy.fraction(abs(coefficient))
    powers, radicand = _powers(factors)
    shared = gcd(int(denominator), int(sympy.numer(radicand).as_coeff_Mul()[0]))  # sympy writes 1/√3 as √3/3
    radicand, denominator = radicand / shared**2, denominator // shared
    if radicand.free_symbols:  # and √(12/d) as 2√3/√d
        if sympy.numer(radicand).as_coeff_Mul()[0] != 1:
            radicand, numerator = radicand * numerator**2, sympy.Integer(1)
        if sympy.denom(radicand).as_coeff_Mul()[0] != 1:
            radicand, denominator = radicand / denominator**2, sympy.Integer(1)
    over = [str(numerator)] * (numerator != 1) + [_power(base, power) for base, power in powers if not power.could_extract_minus_sign()]
    under = [str(denominator)] * (denominator != 1) + [_power(base, -power) for base, power in powers if power.could_extract_minus_sign()]
    if sympy.numer(radicand) != 1:
        over.append(_root(radicand))
    elif radicand != 1:
        under.append(_root(1 / radicand))
    top = ("-" if coefficient.is_negative else "") + (_times(over) or "1")
    if not under:
        return top
    return f"{top}/({_times(under)})" if len(under) > 1 else f"{top}/{under[0]}"


def _powers(factors: tuple[sympy.Expr, ...]) -> tuple[list[tuple[sympy.Expr, sympy.Expr]], sympy.Expr]:
    """The factors as (base, exponent) pairs, and the product of what stands under square roots."""
    powers, radicand = [], sympy.Integer(1)
    for base, exponent in (factor.as_base_exp() for factor in factors):
        root = exponent.is_Rational and abs(exponent) % 1 == HALF
        if root:
            radicand *= base ** sympy.sign(exponent)
            exponent -= sympy.sign(exponent) * HALF
        if exponent != 0:
            powers.append((base, exponent))
    return powers, radicand


def _power(base: sympy.Expr, exponent: sympy.Expr) -> str:
    text = f"({formula(base)})" if isinstance(base, (sympy.Add, sympy.Mul)) else formula(base)
    if exponent == 1:
        return text
    return text + (str(exponent).translate(SUPERSCRIPTS) if exponent.is_Integer else f"^({formula(exponent)})")


def _root(radicand: sympy.Expr) -> str:
    text = formula(radicand)
    return f"√{text}" if text.isidentifier() or text.isdecimal() else f"√({text})"


def _times(factors: list[str]) -> str:
    """4d, 4√d, d√d, 2(d + 1), and a dot wherever the two would run into one word."""
    out = ""
    for factor in factors:
        after_number = out.isdecimal() and (factor[0] in "√(" or ONE_LETTER.match(factor))
        after_letter = len(out) == 1 and out.isalpha() and factor[0] == "√"
        out += factor if not out or after_number or after_letter else f"·{factor}"
    return out
