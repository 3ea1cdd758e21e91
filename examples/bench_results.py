"""What bench_optimizer.py found out: the JSON's records, the table, the acceptance lines, the figure. Needs no GPU and no peer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from contestants import APART
from machine import Machine
from momenta import Error

from scaling.records import Record


class Timing(Record):
    """One contestant on one suite. `why` says why there are no numbers, `products_in` in which dtype matrices are multiplied.

    `milliseconds` of every timed step: between CUDA events around it, or by the wall clock on a CPU. `host_milliseconds`, on CUDA: until
    `step()` returned. `processor_milliseconds`, on a CPU: of all threads, less disturbed by what else runs there. `floor` is the least
    time for the algorithm at the rates measured in this run. `launches` counts kernels on CUDA, operators on a CPU, in one step;
    `products` is the share of their time that matrix products take. `state_bytes` stay between steps, `workspace_bytes` are the most
    a step holds on top.
    """

    name: str
    package: str
    kind: str
    options: str
    products_in: str = ""
    why: str = ""
    first_step_seconds: float = 0.0
    milliseconds: tuple[float, ...] = ()
    host_milliseconds: tuple[float, ...] = ()
    processor_milliseconds: tuple[float, ...] = ()
    floor: float | None = None
    launches: int = 0
    products: float = 0.0
    state_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def median(self) -> float:
        """Of a step, in ms."""
        return median(self.milliseconds)

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile, in ms."""
        if len(self.milliseconds) == 1:
            return self.milliseconds * 2  # pyright: ignore[reportReturnType]
        deciles = quantiles(self.milliseconds, n=10, method="inclusive")
        return deciles[0], deciles[-1]


class Accuracy(Record):
    """Errors of every contestant's first step: name -> matrix -> error."""

    dtype: str
    machine: Machine
    errors: dict[str, dict[str, Error]]


class Race(Record):
    """All contestants on one suite."""

    suite: str
    dtype: str
    parameters: int
    machine: Machine
    timings: tuple[Timing, ...]

    @property
    def ran(self) -> list[Timing]:
        """Those with numbers."""
        return [timing for timing in self.timings if timing.milliseconds]

    @property
    def peers(self) -> list[Timing]:
        """Other people's msign optimizers, the fastest first."""
        return sorted((t for t in self.ran if t.package and t.kind == "msign"), key=lambda t: t.median)

    def of(self, name: str) -> Timing | None:
        """The contestant of that name, if it ran."""
        return next((timing for timing in self.ran if timing.name == name), None)


class Results(Record):
    """The JSON."""

    races: tuple[Race, ...] = ()
    accuracies: tuple[Accuracy, ...] = ()

    def also(self, new: Race | Accuracy) -> Results:
        """With `new`, which replaces what was measured before under the same conditions."""
        kind = "races" if isinstance(new, Race) else "accuracies"
        return self.model_copy(update={kind: (*(old for old in getattr(self, kind) if _condition(old) != _condition(new)), new)})

    def accuracy(self, race: Race) -> dict[str, dict[str, Error]]:
        """Errors measured under the conditions of `race`."""
        like = [a.errors for a in self.accuracies if (a.dtype, a.machine.set) == (race.dtype, race.machine.set)]
        return like[0] if like else {}

    def dump(self) -> str:
        """JSON, a line for each list of numbers."""
        return "\n".join(_lines(json.loads(self.model_dump_json()))) + "\n"


def _condition(result: Race | Accuracy) -> tuple[object, ...]:
    return (getattr(result, "suite", ""), result.dtype, tuple(result.machine.set))


def _lines(value: object, indent: str = "", before: str = "", after: str = "") -> Iterator[str]:
    """As json.dumps(indent=1), but what holds no further list or object stays on one line."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if not any(isinstance(part, dict | list) for part in inner):
        yield f"{indent}{before}{json.dumps(value, ensure_ascii=False)}{after}"
        return
    parts = [(f"{json.dumps(key)}: ", part) for key, part in value.items()] if isinstance(value, dict) else [("", part) for part in inner]
    yield f"{indent}{before}{'{' if isinstance(value, dict) else '['}"
    for number, (key, part) in enumerate(parts):
        yield from _lines(part, f"{indent} ", key, "," * (number + 1 < len(parts)))
    yield f"{indent}{'}' if isinstance(value, dict) else ']'}{after}"


HEAD = (
    "optimizer",
    "in",
    "ms a step",
    "10-90 %",
    "cpu ms",
    "vs torch",
    "of floor",
    "launches",
    "products",
    "state",
    "work",
    "descent",
    "cosine",
    "norm",
)


def table(race: Race, errors: dict[str, dict[str, Error]]) -> str:
    """Everything about one race, aligned."""
    reference = race.of("torch.optim.Muon")
    rows = [HEAD, *(_cells(timing, reference, errors.get(timing.name, {})) for timing in race.ran)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    out = [f"{race.suite}, {race.dtype} parameters ({race.parameters / 1e6:.1f} M), {race.machine.title}"]
    for row in rows:
        first, *rest = (cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        out.append("  ".join([first, *rest]))
    return "\n".join([*out, *(f"{timing.name}: {timing.why}" for timing in race.timings if timing.why)])


def _cells(timing: Timing, reference: Timing | None, errors: dict[str, Error]) -> tuple[str, ...]:
    low, high = timing.spread
    faster = f"{reference.median / timing.median:.2f}x" if reference else ""
    return (
        timing.name,
        timing.products_in,
        f"{timing.median:.4g}",
        f"{low:.4g}-{high:.4g}",
        f"{median(timing.processor_milliseconds or timing.host_milliseconds):.4g}",
        faster,
        f"{timing.floor / timing.median:.0%}" if timing.floor else "",
        str(timing.launches or ""),
        f"{timing.products:.0%}" if timing.launches else "",
        f"{timing.state_bytes / 2**20:.1f}M",
        f"{timing.workspace_bytes / 2**20:.1f}M" if timing.launches else "",
        *_accuracy(errors),
    )


def _accuracy(errors: dict[str, Error]) -> tuple[str, str, str]:
    """Worst descent, median cosine, largest norm."""
    descents = [error.descent for error in errors.values() if error.descent is not None]
    return (
        f"{min(descents):.3f}" if descents else "",
        f"{median(error.cosine for error in errors.values()):.4f}" if errors else "",
        f"{max(error.norm for error in errors.values()):.3f}" if errors else "",
    )


EXPLAINED = """\
in: dtype of the matrix products. cpu ms: on a CPU the processor time of all threads, on CUDA the time until step() returned. vs torch:
times as fast as torch.optim.Muon. of floor: the algorithm's own products and passes over memory, at the rates measured in the run, over
the time taken. launches: kernels (CUDA) or operators (CPU) a step; products: the share of their time in matrix products. state: kept
between steps, work: the most a step holds on top. descent: least <U,Φ>/(‖U‖₂‖Φ‖_*) over the test matrices, 1 for the exact msign; cosine:
median to the exact image; norm: largest ‖U‖₂ over the exact one."""


def markdown(race: Race, errors: dict[str, dict[str, Error]]) -> str:
    """The table for the README, the most exact first; worst descent, median cosine and largest norm over the test matrices."""
    rows = ["| | ms a step | descent | cosine | norm |", "|---|---|---|---|---|"]
    known = [timing for timing in race.ran if timing.kind == "msign" and timing.name in errors and timing.name != APART]
    for timing in sorted(known, key=lambda timing: _accuracy(errors[timing.name]), reverse=True):
        cells = (timing.name if timing.package else f"**{timing.name}**", f"{timing.median:.3g}", *_accuracy(errors[timing.name]))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def accuracies(accuracy: Accuracy) -> str:
    """Cosine / descent / norm of every contestant on every matrix."""
    matrices = list(next(iter(accuracy.errors.values())))
    width = max(map(len, accuracy.errors))
    lines = [f"{accuracy.dtype} parameters, cosine/descent/norm on", "".join(f"\n  [{i}] {name}" for i, name in enumerate(matrices))]
    lines.append(" " * width + "".join(f"{f'[{i}]':>20}" for i in range(len(matrices))))
    for name, errors in accuracy.errors.items():
        cells = (f"{e.cosine:.4f}/{f'{e.descent:.3f}' if e.descent is not None else '-':>5}/{e.norm:.3f}" for e in errors.values())
        lines.append(name.ljust(width) + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def acceptance(results: Results) -> Iterator[str]:
    """The project's own promises, checked against the numbers: a line each."""
    for accuracy in results.accuracies:
        where = f"[{accuracy.dtype}, {accuracy.machine.title}]"
        yield from (f"{line} {where}" for line in _accurate(accuracy.errors))
    for race in results.races:
        where = f"[{race.suite}, {race.dtype}, {race.machine.title}]"
        yield from (f"{line} {where}" for line in _fast(race, results.accuracy(race)))


def _accurate(errors: dict[str, dict[str, Error]]) -> Iterator[str]:
    """On real spectra and Gaussian matrices; what becomes of a nearly rank-1 one is said without a promise."""
    msigns = {name: of for name, of in errors.items() if all(error.descent is not None for error in of.values())}
    for level, share in (("default", 0.97), ("high", 0.99)):
        if own := msigns.get(f"ours, {level}"):
            least, norm = _worst(own, promised=True)
            rank_1, _ = _worst(own, promised=False)
            held = _said(least >= share and norm <= 1.02)
            yield f"{held} {level}: descent {least:.3f} (>= {share}; near rank 1 {rank_1:.3f}), norm {norm:.3f} (<= 1.02)"
    peers = {name: own for name, own in msigns.items() if not name.startswith("ours")}
    if peers:
        best = max(peers, key=lambda name: _worst(peers[name], promised=True)[0])
        yield f"      best peer: descent {_worst(peers[best], promised=True)[0]:.3f} ({best})"
    if (high := msigns.get("ours, high")) and peers:
        margins = {(name, matrix): high[matrix].cosine - e.cosine for name, own in peers.items() for matrix, e in own.items()}
        name, matrix = min(margins, key=lambda key: margins[key])
        least = margins[name, matrix]
        yield f"{_said(least > 0)} high: cosine above every peer's on every matrix, by {least:.4f} at least ({name} on {matrix})"


def _worst(errors: dict[str, Error], *, promised: bool) -> tuple[float, float]:
    """Least descent and largest norm, over the matrices a promise was made for or the others."""
    chosen = [error for name, error in errors.items() if name.startswith("near rank 1") != promised]
    return min(error.descent or 0.0 for error in chosen), max(error.norm for error in chosen)


def _fast(race: Race, errors: dict[str, dict[str, Error]]) -> Iterator[str]:
    ours = race.of("ours, default")
    if ours is None:
        return
    cpu = race.machine.device == "cpu"
    if apart := race.of(APART):
        yield _ratio("default against an optimizer for each weight", apart, ours, 5.0 if race.suite == "many-small" else None)
    if reference := race.of("torch.optim.Muon"):
        slow = race.machine.teraflops["bf16"] < race.machine.teraflops["fp32"]
        yield _ratio("default against torch.optim.Muon", reference, ours, 10.0 if slow else None)
    if race.peers:
        need = None if cpu else 1.3 if race.suite == "gpt2-124m" else 1.25
        yield _ratio(f"default against the fastest peer ({race.peers[0].name})", race.peers[0], ours, need)
    if single := [peer for peer in race.peers if peer.products_in == "fp32"]:
        yield _ratio(f"default against the fastest peer in fp32 ({single[0].name})", single[0], ours, 1.3)
        if (fast := race.of("ours, fast")) and {fast.name, single[0].name} <= errors.keys():
            descents = " against ".join(_accuracy(errors[name])[0] for name in (fast.name, single[0].name))
            yield _ratio(f"fast against the same (descent {descents})", single[0], fast, 1.3)
    if (sn := race.of("ours, SN")) and (adamw := race.of("AdamW, fused")):
        times = sn.median / adamw.median
        yield f"{'     ' if cpu else _said(times <= 1.3)} SN takes {times:.2f} times fused AdamW{'' if cpu else ' (<= 1.3)'}"
    if not cpu and ours.floor and race.suite == "llama-1b":
        share = ours.floor / ours.median
        yield f"{_said(share >= 0.6)} default reaches {share:.0%} of its floor (>= 60%)"


def _ratio(what: str, slow: Timing, fast: Timing, need: float | None) -> str:
    ratio = slow.median / fast.median
    wanted = f" (>= {need:g})" if need else ""
    return f"{_said(ratio >= need) if need else '     '} {what}: {ratio:.2f} times as fast{wanted}"


def _said(held: bool) -> str:
    return "holds" if held else "FAILS"


def plot(results: Results, path: Path) -> None:
    """Writes the figure: a panel per race, share of the steepest descent reached against the time of a step. Needs matplotlib."""
    from matplotlib.figure import Figure

    races = [race for race in results.races if results.accuracy(race)]
    columns = min(2, len(races))
    rows = -(-len(races) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.3 * rows), layout="constrained")
    labels: list[list[Any]] = []
    for number, race in enumerate(races):
        panel = figure.add_subplot(rows, columns, number + 1)
        errors, names = results.accuracy(race), []
        for timing in race.ran:
            if timing.kind != "msign" or timing.name not in errors or timing.name == APART:
                continue
            low, high = timing.spread
            least = min(error.descent or 0 for error in errors[timing.name].values())
            colour = "#3b6ea5" if not timing.package else "#c8452f"
            bars = [[timing.median - low], [high - timing.median]]
            panel.errorbar([timing.median], [least], xerr=bars, marker="o", color=colour, linewidth=1)
            names.append(
                panel.annotate(timing.name, (timing.median, least), xytext=(5, 4), textcoords="offset points", fontsize=7, color=colour)
            )
        if adamw := race.of("AdamW, fused"):
            panel.axvline(adamw.median, color="#888888", linestyle=":", linewidth=1)
            panel.annotate("AdamW", (adamw.median, 0.02), xycoords=("data", "axes fraction"), fontsize=7, color="#888888", rotation=90)
        panel.set_xscale("log")
        panel.set_xlabel("ms a step (median, 10-90 %)")
        panel.set_ylabel("share of the steepest descent, worst matrix")
        panel.set_title(f"{race.suite}, {race.dtype}\n{race.machine.title}", fontsize=9)
        panel.margins(x=0.15)
        left, right = panel.get_xlim()
        panel.set_xlim(right=right * (right / left) ** 0.35)  # room for names
        low, high = panel.get_ylim()
        panel.set_ylim(top=high + 0.12 * (high - low))
        panel.grid(alpha=0.3)
        labels.append(names)
    figure.draw_without_rendering()
    for names in labels:
        _spread(names)
    figure.savefig(path, dpi=130)


def _spread(names: list[Any]) -> None:
    """Move each annotation up until it covers none of those placed before."""
    placed: list[Any] = []
    for name in sorted(names, key=lambda name: (round(name.xy[1], 2), -name.xy[0])):
        for _ in range(12):
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in placed):
                break
            across, up = name.xyann
            name.xyann = (across, up + 8)
        placed.append(name.get_window_extent())


def loaded(path: Path) -> Results:
    """The results in the JSON, or none."""
    return Results.model_validate_json(path.read_text()) if path.exists() else Results()


def report(results: Results, races: Iterable[Race], path: Path) -> str:
    """The tables of `races`, the matrices of their accuracy and what holds."""
    parts = [table(race, results.accuracy(race)) for race in races]
    parts += [accuracies(accuracy) for accuracy in results.accuracies]
    return "\n\n".join([*parts, EXPLAINED, "\n".join(acceptance(results)), f"numbers: {path}"])
