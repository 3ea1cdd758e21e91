"""The examples run, and print what the README shows of them."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """What an example prints, run from the project's root as the README says."""

    def run(name, *options):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *options])
        monkeypatch.syspath_prepend(ROOT / "examples")
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def shown(name):
    """The lines of the README's block after the first mention of an example."""
    after = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"examples/{name}")[2]
    block = after.partition("```\n")[2].partition("```")[0]
    return [line for line in block.splitlines() if line.strip("… ")]


def in_order(lines, output):
    position = 0
    for line in lines:
        position = output.index(line + "\n", position) + len(line)
    return bool(lines)


def test_verify_mup_proves_and_refutes_as_the_readme_shows_and_writes_both(run, tmp_path):
    output = run("verify_mup.py", "--out", str(tmp_path / "out"))
    assert in_order(shown("verify_mup.py"), output)
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"proof.tex", "proof.md", "refutation.tex", "refutation.md"}
    assert "\\textbf{Proposition.}" in written["proof.tex"]
    assert "\\textbf{Not proven.}" in written["refutation.tex"]


def test_lint_my_mup_passes_the_right_one_and_finds_both_faults_as_the_readme_shows(run):
    output = run("lint_my_mup.py")
    assert in_order(shown("lint_my_mup.py"), output)
    right, wrong = output.split("\n\n")
    assert right.startswith("passed")
    assert wrong.count("✗") == 2
