"""The two pictures this field knows: loss against learning rate over widths, and the coordinate check. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scaling.measured import CoordinateCheck, Series
    from scaling.sweep import LearningRateSweep

__all__ = ["coordinates", "learning_rates"]

PASSED, FAILED, GUIDE = "#3b6ea5", "#c8452f", "#888888"


def learning_rates(sweeps: Mapping[str, LearningRateSweep], path: str | Path, *, columns: int = 2) -> None:
    """Writes one panel per sweep, titled with its key: final loss against learning rate, a curve per width, the optima marked.

    Panels of one row share the scale of the loss.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    columns = min(columns, len(sweeps))
    figure, panels = _figure(len(sweeps), columns, size=(5.2, 3.9))
    titles = list(sweeps)
    for row in range(0, len(titles), columns):
        group = titles[row : row + columns]
        losses = [loss for title in group for width in sweeps[title].widths for loss in sweeps[title].losses(width).values()]
        low, high = min(losses), max(loss for loss in losses if loss < math.inf)
        for title, panel in zip(group, panels[row:], strict=False):
            _curves(panel, sweeps[title])
            # Past the middle of the range are runs that hardly trained: they would press the minima flat.
            panel.set_ylim(low - 0.04 * (high - low), low + 0.6 * (high - low))
            panel.set_title(title, fontsize=11)
    _save(figure, path)


def coordinates(checks: Mapping[str, CoordinateCheck], path: str | Path) -> None:
    """Writes a row per check, titled with its key, and a panel per step: log2 RMS against width, a line per activation.

    At step 0 the activations themselves, then their changes since init, each relative to its value at the smallest width, so that
    slopes compare. A change that is not as predicted is red.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    columns = max(len(check.steps) for check in checks.values())
    figure, panels = _figure(len(checks) * columns, columns, size=(3.9, 3.2))
    for row, (title, check) in enumerate(checks.items()):
        for column, step in enumerate(check.steps):
            panel = panels[row * columns + column]
            _lines(panel, check, [by_step[step] for by_step in check.select("activation", "change").values() if step in by_step])
            what = "activations at init" if step == 0 else f"change after {step} step{'s' * (step > 1)}"
            panel.set_title(": ".join(filter(None, (title, what))), fontsize=10)
            panel.set_ylabel("log2 RMS, relative")
    _save(figure, path)


def _curves(panel: Axes, sweep: LearningRateSweep) -> None:
    from matplotlib import colormaps

    best = sweep.optima
    for i, width in enumerate(sweep.widths):
        shade = colormaps["viridis"](0.9 * (1 - i / max(1, len(sweep.widths) - 1)))
        losses = {lr: loss for lr, loss in sweep.losses(width).items() if loss < math.inf}
        panel.plot(list(losses), list(losses.values()), color=shade, marker=".", markersize=4, linewidth=1.6, label=str(width))
        if width in best:
            panel.plot([best[width]], [losses[best[width]]], color=shade, marker="o", markersize=9, markeredgecolor="black", zorder=5)
    panel.plot(
        list(best.values()), [sweep.losses(width)[lr] for width, lr in best.items()], color="black", linewidth=1, linestyle=":", zorder=4
    )
    panel.set_xscale("log", base=2)
    panel.set_xlabel("learning rate")
    panel.set_ylabel("training loss")
    panel.legend(title="width", fontsize=8, title_fontsize=8, loc="upper center", ncols=len(sweep.widths), framealpha=0.9, edgecolor="none")


def _lines(panel: Axes, check: CoordinateCheck, group: Sequence[Series]) -> None:
    x = [math.log2(width) for width in check.widths]
    shown = [series for series in group if series.slope is not None and math.isfinite(series.slope)]
    missed = check.missed
    for series in shown:
        failed = series in missed
        y = [math.log2(value / series.values[0]) for value in series.values]
        panel.plot(x, y, color=FAILED if failed else PASSED, alpha=0.7, linewidth=1.2, marker=".", zorder=3 if failed else 2)
    for slope, name in ((1, "1"), (0, "0"), (-0.5, "-1/2")):
        end = slope * (x[-1] - x[0])
        panel.plot([x[0], x[-1]], [0, end], color=GUIDE, linewidth=0.8, linestyle="--", zorder=1)
        panel.annotate(name, (x[-1], end), textcoords="offset points", xytext=(4, -3), fontsize=7, color=GUIDE)
    slopes = [series.slope for series in shown if series.slope is not None]
    if slopes:
        panel.text(0.03, 0.96, f"slopes {min(slopes):+.2f} to {max(slopes):+.2f}", transform=panel.transAxes, va="top", fontsize=8)
    panel.set_xticks(x, [str(width) for width in check.widths])
    panel.set_xlabel("width")


def _figure(panels: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("plotting", "matplotlib", "plot") from error
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", dpi=150)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[panels:]:
        empty.set_axis_off()
    for panel in axes[:panels]:
        panel.grid(visible=True, color="#dddddd", linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
