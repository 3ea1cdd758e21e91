"""FORMATS: how a scaling table is written out."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable
from itertools import zip_longest

import sympy

from scaling.explain import explain
from scaling.interchange import from_json, to_dict, to_json
from scaling.notation import Text, formula, plain, render
from scaling.records import ScalingTable
from scaling.sheet import Line, Section, sheet

__all__ = ["FORMATS", "explain", "from_json", "to_dict", "to_html", "to_json", "to_latex", "to_markdown", "to_text"]

PAGE = 120  # characters across, where no width is given
GAP = "  "
BESIDE, BELOW = {"why": 20, "weight": 24}, {"weight": 16}
"""Columns that wrap on a narrow page, in this order, and the characters they keep, while the why stands beside the rest or below it."""


# --- text ---------------------------------------------------------------------------------------------------------------------------


def to_text(table: ScalingTable, *, full: bool = False, width: int | None = None) -> str:
    """The table in Unicode, for a terminal; repeated blocks folded unless `full`.

    Args:
        table: the table.
        full: one line per weight.
        width: characters across, 120 if None. On a narrow page names wrap at their dots and the last column at spaces or, narrower still,
            moves to a line of its own; formulas stay whole.
    """
    page, width = sheet(table, full=full), width or PAGE
    headings = ("weight", *(re.sub("[ _]", "\n", heading) for heading in page.columns))
    rows = [(_names(line), *map(plain, line.cells)) for line in page.lines]
    widths = _widths(headings, rows, width, BESIDE)
    if _across(widths) > width:
        widths = _widths(headings[:-1], [row[:-1] for row in rows], width, BELOW)
    head, *body = [
        "\n".join([_row(row[: len(widths)], widths), *(_fill(cell, width, 4) for cell in row[len(widths) :] if cell)])
        for row in (headings, *rows)
    ]
    rule = "─" * _across(widths)
    footer = [line for section in page.sections for line in _section(section, width)]
    return "\n".join([head, rule, *body, rule, *footer])


def _names(line: Line) -> str:
    first, *ties = map(plain, line.names)
    head = f"  {first}" if line.part else first + (f" ×{line.weights}" if line.weights > 1 else "")
    return "\n".join([head, *(f"  {tie}" for tie in ties)])


def _widths(headings: tuple[str, ...], rows: list[tuple[str, ...]], width: int, narrowest: dict[str, int]) -> list[int]:
    columns = zip(headings, *rows, strict=True)
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    for heading, least in narrowest.items():
        at = headings.index(heading)
        widths[at] = min(widths[at], max(least, widths[at] - max(0, _across(widths) - width)))
    return widths


def _across(widths: list[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    stacks = [[part for line in cell.split("\n") for part in _wrap(line, width)] for cell, width in zip(cells, widths, strict=True)]
    lines = zip_longest(*stacks, fillvalue="")
    return "\n".join(GAP.join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _wrap(line: str, width: int) -> list[str]:
    """The line's parts, broken at spaces, and inside a name after dots where it must be."""
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    out = [line[: len(indent) - 2]]
    for piece in re.findall(r"(?:[^.\s]|\.(?=\s))+\.?\s*(?:×\d+)?", line):
        if len(out[-1]) + len(piece.rstrip()) > width and out[-1].strip():
            out.append(indent)
        out[-1] += piece
    return [part.rstrip() for part in out]


def _section(section: Section, width: int) -> list[str]:
    return [section.title, *(_fill(plain(line), width, 2) for line in section.lines)]


def _fill(text: str, width: int, indent: int) -> str:
    first, rest = " " * indent, " " * (indent + 4)
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


# --- Markdown -----------------------------------------------------------------------------------------------------------------------


def to_markdown(table: ScalingTable, *, full: bool = False) -> str:
    """The table as GitHub-flavoured Markdown. Formulas are Unicode, which every viewer shows (GitHub, PyPI, an editor)."""
    page = sheet(table, full=full)
    rows = [("weight", *page.columns), ("---",) * (len(page.columns) + 1)]
    rows += [(_stacked_names(line, _markdown, "&emsp;"), *map(_markdown, line.cells)) for line in page.lines]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    for section in page.sections:
        lines += ["", f"**{section.title}**", "", *(f"- {_markdown(line)}" for line in section.lines)]
    return "\n".join(lines) + "\n"


def _markdown(text: Text) -> str:
    return render(text, lambda words: re.sub(r"([\\*<`])", r"\\\1", words), _backticks, formula)


def _backticks(code: str) -> str:
    fence = "`" * (max(map(len, re.findall("`+", code)), default=0) + 1)
    return f"{fence} {code} {fence}" if code.startswith("`") or code.endswith("`") else f"{fence}{code}{fence}"


# --- HTML ---------------------------------------------------------------------------------------------------------------------------

STYLE = """
.scaling-table { font-size: 90%; line-height: 1.35; color: inherit; overflow-x: auto; }
.scaling-table table { font-size: inherit; border-collapse: collapse; margin: 0.5em 0; }
.scaling-table th, .scaling-table td { padding: 0.2em 0.7em; text-align: left; vertical-align: top; }
.scaling-table th, .scaling-table td { background: transparent; color: inherit; }
.scaling-table td.whole { white-space: nowrap; }
.scaling-table thead th { border-bottom: 1px solid rgba(128, 128, 128, 0.8); font-weight: 600; white-space: nowrap; }
.scaling-table tbody tr + tr td, .scaling-table tbody tr + tr th { border-top: 1px solid rgba(128, 128, 128, 0.25); }
.scaling-table tbody tr:hover { background: rgba(128, 128, 128, 0.12); }
.scaling-table code { font-size: 95%; background: transparent; color: inherit; }
.scaling-table summary { cursor: pointer; font-weight: 600; }
.scaling-table ul { margin: 0.2em 0 0.6em; }
"""


def to_html(table: ScalingTable, *, full: bool = False) -> str:
    """The table as one self-contained `<div>`: no script, no colours but the page's own, so it reads in light and dark notebooks."""
    page = sheet(table, full=full)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ("weight", *page.columns))
    rows = "\n".join(f"<tr>{_html_row(line, page.columns)}</tr>" for line in page.lines)
    footer = "\n".join(
        f"<details open><summary>{html.escape(section.title)}</summary><ul>"
        + "".join(f"<li>{_html(line)}</li>" for line in section.lines)
        + "</ul></details>"
        for section in page.sections
    )
    table_html = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f'<div class="scaling-table">\n<style>{STYLE}</style>\n{table_html}\n{footer}\n</div>'


def _html_row(line: Line, columns: tuple[str, ...]) -> str:
    cells = (
        f"<td>{_html(cell)}</td>" if column == "why" else f'<td class="whole">{_html(cell)}</td>'
        for column, cell in zip(columns, line.cells, strict=True)
    )
    return f'<td class="whole">{_stacked_names(line, _html, "&emsp;")}</td>' + "".join(cells)


def _stacked_names(line: Line, write: Callable[[Text], str], indent: str) -> str:
    first, *ties = map(write, line.names)
    head = indent + first if line.part else first + (f" ×{line.weights}" if line.weights > 1 else "")
    return "<br>".join([head, *(indent + tie for tie in ties)])


def _html(text: Text) -> str:
    return render(text, html.escape, lambda code: f"<code>{html.escape(code)}</code>", lambda expression: html.escape(formula(expression)))


# --- LaTeX --------------------------------------------------------------------------------------------------------------------------

LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", '"': "''"},
    **{
        "×": r"$\times$",
        "·": r"$\cdot$",
        "√": r"$\surd$",
        "→": r"$\to$",
        "–": "--",
        "—": "---",
        "…": r"\dots{}",
        "≤": r"$\le$",
        "≥": r"$\ge$",
    },
    **{
        "σ": r"$\sigma$",
        "ε": r"$\varepsilon$",
        "η": r"$\eta$",
        "λ": r"$\lambda$",
        "Θ": r"$\Theta$",
        "∞": r"$\infty$",
        "‖": r"$\|$",
        "²": "$^2$",
    },
}
"""Characters that LaTeX reads as commands or that pdflatex does not know."""


def to_latex(table: ScalingTable, *, full: bool = False) -> str:
    """The table as a LaTeX `tabular` and the footer as lists; needs no package. Formulas are set by `sympy.latex`."""
    page = sheet(table, full=full)
    head = " & ".join(map(_latex_words, ("weight", *page.columns))) + r" \\"
    rows = [" & ".join([_latex_names(line), *map(_latex, line.cells)]) + r" \\" for line in page.lines]
    lines = [rf"\begin{{tabular}}{{{'l' * (len(page.columns) + 1)}}}", r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}"]
    for section in page.sections:
        items = [rf"\item{{}} {_latex(line)}" for line in section.lines]
        lines += ["", rf"\medskip\noindent\textbf{{{_latex_words(section.title)}}}", r"\begin{itemize}", *items, r"\end{itemize}"]
    return "\n".join(lines) + "\n"


def _latex_names(line: Line) -> str:
    head = (r"\quad " if line.part else "") + " ".join(map(_latex, line.names))
    return head + (rf" $\times {line.weights}$" if line.weights > 1 else "")


def _latex(text: Text) -> str:
    return render(text, _latex_words, lambda code: rf"\texttt{{{_latex_words(code)}}}", lambda expression: f"${sympy.latex(expression)}$")


def _latex_words(words: str) -> str:
    return "".join(LATEX.get(char, char) for char in words)


FORMATS: dict[str, Callable[[ScalingTable], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "latex": to_latex,
    "html": to_html,
    "json": to_json,
}
"""Name -> the table as text in that format. A new format is one function here."""
