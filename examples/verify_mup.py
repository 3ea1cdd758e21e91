"""Prove that the rules derived for a GPT are muP, and see what a proof says of a parametrization that is not.

    python examples/verify_mup.py    # seconds

Writes both verdicts as LaTeX and Markdown into out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sympy
from arms import gpt_table

from scaling import parametrization, verify


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the LaTeX and Markdown")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    table = gpt_table()
    proven = verify(table, against="mup", optimizer="adam")

    theirs = parametrization(table, "table8")  # Tensor Programs V, whose logits are divided by d; this one forgets to
    head = [law.model_copy(update={"multiplier": sympy.Integer(1)}) for law in theirs.laws["lm_head.weight"]]
    forgetful = theirs.model_copy(
        update={"name": "table 8 without its readout multiplier", "laws": theirs.laws | {"lm_head.weight": tuple(head)}}
    )
    refuted = verify(forgetful, table=table, optimizer="adam")

    for name, verdict in {"proof": proven, "refutation": refuted}.items():
        print(verdict if verdict else verdict.to_text().partition("\nUpdates")[0], end="\n\n")
        (out / f"{name}.tex").write_text(verdict.to_latex(), encoding="utf-8")
        (out / f"{name}.md").write_text(verdict.to_markdown(), encoding="utf-8")
    print(f"written: {', '.join(str(out / f'{name}.tex') + ', .md' for name in ('proof', 'refutation'))}")


if __name__ == "__main__":
    main()
