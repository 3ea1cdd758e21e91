"""How fast, and how exact, is msign? Our optimizer beside every other Muon that is installed, in one process, on this machine's device.

Shapes of a 124M GPT-2, a 1B Llama and four layers of a 7B Llama on a GPU; small ones on a CPU. Gradients have the spectra of real
momenta and change every step. In the same run each contestant's update is compared with the exact polar factor in fp64. Peers are
optional: one that is not installed, or does not run, is reported as such. Results go to results/bench_optimizer_<device>.json, suite
by suite; a suite that is run again replaces its numbers.

    pip install gram-newton-schulz emerging-optimizers heavyball muon-optimizer optimuon muonium pytorch-optimizer triton-muon-adamw
    python examples/bench_optimizer.py
    python examples/bench_optimizer.py --suite llama-1b --dtype bf16
    python examples/bench_optimizer.py --plot-only   # the tables and the figure again, from the JSON
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from bench_results import Accuracy, Race, Results, loaded, markdown, plot, report
from contestants import CLIP, MOMENTUM, Contestant, Weights, contestants
from machine import DTYPES, NAMES, Machine, installed, measured
from momenta import TESTED, TESTED_ON_CUDA, Error, Exact, matrix, rotating
from stopwatch import Runner, Shapes

SUITES: dict[str, dict[str, Shapes]] = {
    "cuda": {
        "gpt2-124m": [(768, 768)] * 48 + [(3072, 768), (768, 3072)] * 12,
        "llama-1b": [(2048, 2048)] * 32 + [(512, 2048)] * 32 + [(8192, 2048), (8192, 2048), (2048, 8192)] * 16,
        "llama-7b-slice": [(4096, 4096)] * 16 + [(11008, 4096), (11008, 4096), (4096, 11008)] * 4,
        "tiny": [(48, 48), (48, 48), (32, 96), (96, 32)],
    },
    "cpu": {
        "gpt-256": [(256, 256)] * 16 + [(1024, 256), (256, 1024)] * 4,
        "gpt2-layer": [(768, 768)] * 4 + [(3072, 768), (768, 3072)],
        "many-small": [(128, 128)] * 64,
        "tiny": [(48, 48), (48, 48), (32, 96), (96, 32)],
    },
}
"""Device -> suite -> the weights. "tiny" is for trying the script; it runs when named."""

SETS = 4
"""Gradient sets in rotation: no step finds its gradients in a cache."""
ROUNDS = {"cuda": 50, "cpu": 20}
WARM_UP = {"cuda": 5, "cpu": 2}
PASSES = {"cuda": 2, "cpu": 1}
"""On CUDA, where weights and state of all would not fit, one contestant after the other, and all of them again."""
HOPELESS = 60_000.0
"""Milliseconds."""
OUT = Path(__file__).parent / "results"


def missing(contestant: Contestant, device: torch.device) -> str:
    """Why there is no point in trying, or ""."""
    if contestant.package and installed(contestant.package) is None:
        return "not installed"
    return "does not run: needs CUDA" if contestant.cuda and device.type != "cuda" else ""


def hopeless(floor: float | None) -> str:
    """Says so where an algorithm would take very long on this machine at best."""
    return f"left out: no less than {floor / 1e3:.0f} s a step at this machine's rate" if floor and floor > HOPELESS else ""


def race(suite: str, dtype: str, entered: Sequence[Contestant], rounds: int, machine: Machine, device: torch.device) -> Race:
    """Time all contestants on one suite: on a CPU in turn, in a new order every round, so that noise strikes all alike."""
    shapes = SUITES[device.type][suite]
    sets = list(rotating(shapes, SETS, DTYPES[dtype], torch.Generator(device).manual_seed(0)))
    floors = {contestant.name: floor(contestant, shapes, DTYPES[dtype], machine) for contestant in entered}
    runners = [Runner(contestant, missing(contestant, device) or hopeless(floors[contestant.name])) for contestant in entered]
    passes = PASSES[device.type]
    for heat in ([runners] if device.type == "cpu" else [[runner] for runner in runners]) * passes:
        for runner in heat:
            if not runner.why:
                runner.start(sets, WARM_UP[device.type])
                took = runner.measured.get("first_step_seconds", 0)
                print(f"  {runner.contestant.name}: {runner.why or f'first step {took:.2f} s'}", file=sys.stderr, flush=True)
        order = random.Random(0)
        for number in range(max(1, rounds // passes)):
            for runner in order.sample(heat, len(heat)):
                if not runner.rests:
                    runner.step(sets[number % SETS])
        for runner in heat:
            runner.stop()
    timings = tuple(
        r.timing(floors[r.contestant.name], "+".join(NAMES[product] for product in products(r.contestant, shapes))) for r in runners
    )
    return Race(suite=suite, dtype=dtype, parameters=sum(out * into for out, into in shapes), machine=machine, timings=timings)


def floor(contestant: Contestant, shapes: Shapes, dtype: torch.dtype, machine: Machine) -> float | None:
    """Milliseconds for the algorithm's products and passes, at the measured rates; None where no algorithm is known."""
    if (least := contestant.floor) is None:
        return None
    flops = products(contestant, shapes)
    between = min((product.itemsize for product in flops), default=2)
    moved = sum(out * into for out, into in shapes) * (least.passes * dtype.itemsize + least.between * between)
    seconds = moved / (machine.gigabytes_per_second * 1e9)
    seconds += sum(count / (machine.teraflops[NAMES[product]] * 1e12) for product, count in flops.items())
    return float(f"{1e3 * seconds:.4g}")


def products(contestant: Contestant, shapes: Shapes) -> Counter[torch.dtype]:
    """Floating point operations of a step's matrix products, by dtype."""
    least = contestant.floor
    return sum((least.flops(min(shape), max(shape)) for shape in shapes), Counter()) if least else Counter()


def accuracy(dtype: str, entered: Sequence[Contestant], machine: Machine, device: torch.device) -> Accuracy:
    """Every contestant's first update of a zero weight against the exact image of the gradient, in fp64."""
    tested = TESTED_ON_CUDA if device.type == "cuda" else TESTED
    generator = torch.Generator().manual_seed(1)
    grads = [matrix(name, shape, generator).to(device, DTYPES[dtype]) for name, shape in tested]
    exact = [Exact.of(X, device) for X in grads]
    errors: dict[str, dict[str, Error]] = {}
    for contestant in entered:
        if missing(contestant, device) or not contestant.kind:
            continue
        weights: Weights = [torch.nn.Parameter(torch.zeros_like(X)) for X in grads]
        for W, X in zip(weights, grads, strict=True):
            W.grad = X.clone()
        try:
            contestant.build(weights).step()
        except Exception as error:  # the race says so at length
            print(f"  {contestant.name}: {type(error).__name__}", file=sys.stderr, flush=True)
            continue
        errors[contestant.name] = {
            f"{name} {shape[0]}x{shape[1]}": E.error(-W.data.double() / contestant.scale(*shape), contestant.kind, CLIP * (1 - MOMENTUM**2))
            for (name, shape), W, E in zip(tested, weights, exact, strict=True)
        }
    return Accuracy(dtype=dtype, machine=machine, errors=errors)


def main(arguments: Iterable[str]) -> None:
    """The command line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everyone = contestants(device)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=sorted({suite for suites in SUITES.values() for suite in suites}))
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of the parameters")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in everyone], metavar="NAME", help="these contestants alone")
    parser.add_argument("--rounds", type=int, default=ROUNDS[device.type], help="timed steps of each")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON and the figure")
    parser.add_argument("--plot-only", action="store_true", help="print the tables and draw the figure from the JSON")
    parser.add_argument("--markdown", action="store_true", help="print the README's table from the JSON, of the one --suite and --dtype")
    parser.add_argument("--device", choices=SUITES, default=device.type, help="whose results to print, with --plot-only or --markdown")
    options = parser.parse_args([*arguments])
    options.suite = options.suite or [suite for suite in SUITES[options.device] if suite != "tiny"]
    path: Path = options.out / f"bench_optimizer_{options.device}.json"
    results = loaded(path)
    if options.markdown:
        print("\n\n".join(markdown(race, results.accuracy(race)) for race in results.races if chosen(race, options)))
        return
    if not options.plot_only:
        if options.device != device.type or not set(options.suite) <= SUITES[device.type].keys():
            parser.error(f"this machine runs {', '.join(SUITES[device.type])} ({device.type})")
        options.out.mkdir(parents=True, exist_ok=True)
        entered = [c for c in everyone if options.only is None or c.name in options.only]
        results = run(results, path, entered, options, device)
    if not results.races:
        sys.exit(f"{path} is not there: run without --plot-only first")
    plot(results, path.with_suffix(".png"))
    print(report(results, results.races, path))
    print(f"figure: {path.with_suffix('.png')}")


def chosen(race: Race, options: argparse.Namespace) -> bool:
    """Whether the command line names it."""
    return race.suite in options.suite and race.dtype in options.dtype and not race.machine.set


def run(results: Results, path: Path, entered: Sequence[Contestant], options: argparse.Namespace, device: torch.device) -> Results:
    """Measure what is asked for, written to `path` after each part."""
    here = measured(device, (contestant.package for contestant in entered if contestant.package))
    for dtype in options.dtype:
        print(f"accuracy, {dtype}", file=sys.stderr, flush=True)
        results = _kept(results.also(accuracy(dtype, entered, here, device)), path)
        for suite in options.suite:
            print(f"{suite}, {dtype}", file=sys.stderr, flush=True)
            results = _kept(results.also(race(suite, dtype, entered, options.rounds, here, device)), path)
    return results


def _kept(results: Results, path: Path) -> Results:
    partial = path.with_suffix(".partial")
    partial.write_text(results.dump())
    partial.replace(path)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
