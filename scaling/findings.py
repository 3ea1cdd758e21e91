"""What `lint` returns: every finding, and how it is written out."""

from __future__ import annotations

from typing import Literal

from scaling.folding import fold
from scaling.records import Exact, Record, Source
from scaling.training import Saved

__all__ = ["Finding", "Kind", "LintReport", "Severity"]

Kind = Literal["init", "mean", "lr", "multiplier", "attention", "weight_decay", "eps", "clip", "group", "matrix optimizer", "unused"]
Severity = Literal["error", "warning", "note"]

MARKS: dict[Severity, str] = {"error": "✗", "warning": "!", "note": "·"}
READING = "d is the width. Powers of d are meant up to constants: where the code has m = d/base, read m for d."


class Finding(Record):
    """One fault: what of which weights, its value as a power of d, what it should be, and the factor that is missing."""

    kind: Kind
    severity: Severity
    weights: tuple[str, ...]
    what: str
    found: str
    expected: str
    factor: Exact | None
    where: Source | None
    fix: str

    @property
    def weight(self) -> str:
        """The first of the weights."""
        return self.weights[0] if self.weights else ""

    def __str__(self) -> str:
        return f"{self._headline}\n{self._place}"

    @property
    def _headline(self) -> str:
        return f"{MARKS[self.severity]} {self.what} is {self.found}, should be {self.expected}\n    fix: {self.fix}"

    @property
    def _place(self) -> str:
        lines = [f"    {', '.join(fold(self.weights))}"] if self.weights else []
        return "\n".join([*lines, *([f"        at {self.where}"] if self.where else [])])


class LintReport(Saved):
    """All findings. `passed`: no finding is an error; notes are choices that others made on purpose."""

    model: str
    widths: tuple[int, ...]
    optimizers: tuple[str, ...]
    weights: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether there is no error."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that are no mere notes."""
        return tuple(finding for finding in self.findings if finding.severity != "note")

    @property
    def verdict(self) -> str:
        """The outcome, and of what, in one line."""
        errors = sum(finding.severity == "error" for finding in self.findings)
        outcome = "passed" if self.passed else f"failed: {errors} fault{'s' if errors > 1 else ''}"
        widths = ", ".join(map(str, self.widths))
        return f"{outcome}; {self.model}, {self.weights} weights, {' and '.join(self.optimizers)}, widths {widths}"

    def to_text(self) -> str:
        """The findings for a terminal, the worst first; what is the same of several weights is said once."""
        same: dict[str, list[str]] = {}
        for one in self.findings:
            same.setdefault(one._headline, []).append(one._place)
        out = [line for headline, places in same.items() for line in (headline, *places)]
        return "\n".join([*out, *([READING] if self.findings else []), self.verdict])

    def to_markdown(self) -> str:
        """The findings as a GitHub-flavoured Markdown table."""
        out = [f"**{self.verdict[:1].upper()}{self.verdict[1:]}**", ""]
        if self.findings:
            out += ["| | weights | what | is | should be | fix | where |", "|---|---|---|---|---|---|---|"]
        for one in self.findings:
            names = ", ".join(f"`{name}`" for name in fold(one.weights))
            cells = (MARKS[one.severity], names, one.what, one.found, one.expected, one.fix, f"`{one.where}`" if one.where else "")
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join([*out, *(["", READING] if self.findings else [])]) + "\n"

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()
