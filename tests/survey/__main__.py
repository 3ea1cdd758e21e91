"""Runs the survey: `python -m tests.survey --zoo /path/to/zoo [--family huggingface] [--only bert] [--again]`."""

import argparse
import json
import multiprocessing
import platform
import resource
import subprocess
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from scaling import derive
from tests.survey.cases import Case, all_cases
from tests.survey.row import row

MODES = ("factory", "also", "config", "alone", "overrides", "stated", "exceptions", "wrong_rules", "unsound")
RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    """Runs what is asked for and not there yet; writes after every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, help="the folder of zoo_hf.py and models.json")
    parser.add_argument("--family", default="", help="only families that begin so")
    parser.add_argument("--only", nargs="*", help="only these models")
    parser.add_argument("--again", action="store_true", help="also those that the results have")
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds for one model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    derive(torch.nn.Linear(3, 4))  # what torch imports for it is imported once, not in every process
    commit = _commit()
    rows = {(r["family"], r["name"]): r for r in (json.loads(options.results.read_text())["models"] if options.results.exists() else [])}
    for case in all_cases(options.zoo):
        key = case.family, case.name
        asked = case.family.startswith(options.family) and (not options.only or case.name in options.only)
        if asked and (options.again or key not in rows):
            rows[key] = _in_its_own_process(case, options.limit) | {"commit": commit}
            _write(options.results, rows)
            print(_line(rows[key]), flush=True)


def _in_its_own_process(case: Case, limit: int) -> dict[str, Any]:
    """The row; a crash, a hang or a failure of the survey itself is one too."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        try:
            theirs.send(row(case))
        except Exception:
            theirs.send({"family": case.family, "name": case.name, "derived": False, "error": traceback.format_exc()[-900:]})

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        result = {"family": case.family, "name": case.name, "derived": False, "error": f"more than {limit} CPU seconds, or a crash"}
    process.join()
    return result


def _commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def _line(result: dict[str, Any]) -> str:
    if not result["derived"]:
        return f"{result['name']}: {result['error']}"
    wrong = " ".join(f"{mode} {len(result[mode])}" for mode in MODES if result.get(mode))
    return f"{result['name']}: {result['seconds']} s, {result.get('axes', 0)} axes; {wrong}; inputs {result['no_inputs'][:100]}"


def _write(path: Path, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    out = {"environment": _environment(), "families": _families(list(rows.values())), "models": list(rows.values())}
    text = json.dumps(out | {"models": "@"}, indent=1, ensure_ascii=False)
    models = "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in out["models"]) + "\n]"
    path.write_text(text.replace('"@"', models) + "\n")


def _environment() -> dict[str, str]:
    import timm
    import torchvision
    import transformers

    versions = {library.__name__: library.__version__ for library in (torch, torchvision, timm, transformers)}
    return {"python": platform.python_version(), "machine": platform.machine(), "date": time.strftime("%Y-%m-%d")} | versions


def _families(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table of successes."""
    of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        of[r["family"]].append(r)
    of["all"] = rows
    return {family: _success(members) for family, members in of.items()}


def _success(rows: list[dict[str, Any]]) -> dict[str, Any]:
    derived = [r for r in rows if r["derived"]]
    widths = [r for r in derived if "axes" in r]
    axes = sum(r.get("axes", 0) for r in widths)
    return {
        "models": len(rows),
        "derived": len(derived),
        "all weights reached": sum(not r.get("unreached") for r in derived),
        "every operator has a rule": sum(not r.get("without_rule") for r in derived),
        "untouched": sum(r["untouched"] for r in derived),
        "inputs found": sum(r["no_inputs"] == "found" for r in derived),
        "with several widths": len(widths),
        "axes": axes,
        "axes right": {mode: axes - sum(len(r.get(mode, [])) for r in widths) for mode in ("factory", "also", "alone")},
        "overrides": dict(sorted(Counter(len(r.get("overrides", [])) for r in widths).items())),
        "rules": sum(r.get("rules", 0) for r in widths),
        "exceptions": sum(len(r.get("exceptions", {})) for r in widths),
        "wrong rules": sum(len(r.get("wrong_rules", {})) for r in widths),
        "unsound": sum(len(r.get("unsound", [])) for r in widths),
        "seconds": round(sum(r["seconds"] for r in derived), 1),
    }


if __name__ == "__main__":
    main()
