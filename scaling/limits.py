"""The limit d→∞, exactly: leading powers of the width, and the text form of exact expressions."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import cache

import sympy

__all__ = ["DEPTH", "WIDTH", "exact", "exponent", "leading"]

WIDTH = sympy.Symbol("d", positive=True)
"""The width d."""

DEPTH = sympy.Symbol("L", positive=True)
"""The depth L: residual branches that are added to the stream one after the other."""

_BINARY: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable] = {"sqrt": sympy.sqrt, "Min": sympy.Min, "Max": sympy.Max, "Rational": sympy.Rational}


def exact(value: object) -> sympy.Expr:
    """An exact expression in d, from a sympy expression, an int or the text that `str` of an expression gives.

    Text is parsed by a small grammar (numbers, oo, names, + - * / **, sqrt, Min, Max), never evaluated.

    Raises:
        ValueError: on a float, which is not exact, or on any other text.

    >>> exact("sqrt(Min(1, 65/d)/d)")
    sqrt(Min(1, 65/d))/sqrt(d)
    """
    if isinstance(value, str):
        return _parse(ast.parse(value, mode="eval").body, value)
    if isinstance(value, float):
        message = f"{value!r} is a float; exact expressions are made of integers"
        raise ValueError(message)
    expression: sympy.Expr = sympy.sympify(value)  # pyright: ignore[reportAssignmentType] - sympify is typed as Basic
    return expression


def _parse(node: ast.expr, text: str) -> sympy.Expr:
    match node:
        case ast.Constant(value=int(number)):
            return sympy.Integer(number)
        case ast.Name(id="oo"):
            return sympy.oo
        case ast.Name(id=name):
            return sympy.Symbol(name, positive=True)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_parse(left, text), _parse(right, text))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_parse(operand, text)
        case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_parse(arg, text) for arg in args))
    message = f"not an exact expression: {text!r}"
    raise ValueError(message)


@cache
def leading(expression: sympy.Expr, symbol: sympy.Symbol = WIDTH) -> tuple[sympy.Expr, sympy.Expr]:
    """`(c, k)` with `expression ~ c * symbol**k` as the symbol goes to infinity; all other symbols are constants.

    Exact for sums, products, powers, Min and Max of positive terms, which is what every rule is made of.

    Raises:
        ValueError: for any other function of the symbol.

    >>> d = WIDTH
    >>> leading(sympy.sqrt(sympy.Min(1, 65 / d) / d))
    (sqrt(65), -1)
    """
    if not expression.has(symbol):
        return expression, sympy.Integer(0)
    if expression == symbol:
        return sympy.Integer(1), sympy.Integer(1)
    terms = [leading(argument, symbol) for argument in expression.args]
    if isinstance(expression, sympy.Mul):
        return sympy.Mul(*(c for c, _ in terms)), sympy.Add(*(k for _, k in terms))
    if isinstance(expression, sympy.Pow) and not expression.exp.has(symbol):
        (c, k), power = terms[0], expression.exp
        return c**power, k * power
    if isinstance(expression, sympy.Abs):  # sympy's √((d - 2)²): lengths are positive
        return terms[0]
    if isinstance(expression, (sympy.Add, sympy.Max, sympy.Min)):
        top = (min if isinstance(expression, sympy.Min) else max)(k for _, k in terms)
        return expression.func(*(c for c, k in terms if k == top)), top
    message = f"the growth of {expression} in {symbol} is not known"
    raise ValueError(message)


def exponent(expression: sympy.Expr, symbol: sympy.Symbol = WIDTH) -> sympy.Rational:
    """The power of d that `expression` follows as d→∞: lim log(expression)/log(d), an exact Rational.

    >>> exponent(sympy.sqrt(sympy.Min(1, 65 / WIDTH) / WIDTH))
    -1
    """
    power = leading(expression, symbol)[1]
    if not isinstance(power, sympy.Rational):
        message = f"the exponent of {expression} in {symbol} is {power}, not a rational number"
        raise ValueError(message)
    return power
