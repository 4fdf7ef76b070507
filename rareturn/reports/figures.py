"""The report's pictures, each as the bytes of a PNG file: equal input gives equal bytes.

Blue and orange stand for before and after throughout; they stay apart for colour-blind readers and in grey print.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

BEFORE, AFTER, GREY = "#0072B2", "#D55E00", "#666666"
WIDTH = 6.2  # inches; narrow, so that the text is legible where a phone shows the whole width
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 11,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
Stage = Mapping[str, Any]  # what `score_predictions` gives
Curve = tuple[str, np.ndarray, Sequence[float], float | None]


def _as_png(draw: Callable[..., Any]) -> Callable[..., bytes]:
    """Let a function that draws a figure return its PNG file, drawn in `STYLE`."""

    def png(*arguments) -> bytes:
        import matplotlib

        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            # The layout is made with a first guess at the tick labels; the tight box keeps what grew since.
            figure = draw(*arguments)
            figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight")
        return buffer.getvalue()

    return png


def _figure(title: str, height: float, rows: int = 1, **options) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, 1, squeeze=False, **options)[:, 0]


def _numbered(names: Sequence[str], first: int = 0) -> list[str]:
    """`number name`, as axes show a label, wrapped."""
    return [textwrap.fill(f"{number} {name}", 22) for number, name in enumerate(names, first)]


def _heatmap(
    title: str, names: Sequence[str], values: np.ndarray, texts: Any, bar: str, height: float, fontsize: int
) -> tuple[Any, Any]:
    """A square of values from 0 to 1 with a text in each cell; rows have numbered names, columns their numbers."""
    figure, (axes,) = _figure(title, 2.0 + height * len(names))
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        colour = "white" if values[row, column] > 0.55 else "black"
        style = {"ha": "center", "va": "center", "color": colour, "fontsize": fontsize}
        axes.text(column, row, texts[row][column], **style)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(names)), [name.split()[0] for name in names])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=bar, shrink=0.8)
    return figure, axes


@_as_png
def per_class_f1(
    names: Sequence[str], counts: Sequence[int], before: Stage, after: Stage, positive: Sequence[int]
) -> Any:
    """F1 of every label and its 95 % interval, before and after the decision; `counts` are the labels' rows.

    Labels outside `positive` are marked, since the macro scores leave them out.
    """
    figure, (axes,) = _figure("F1 of each label before and after the decision rule", 1.5 + 0.5 * len(names))
    places = np.arange(len(names))
    for stage, colour, marker, shift, name in (
        (before, BEFORE, "o", -0.14, "argmax"),
        (after, AFTER, "D", 0.14, "decision rule, cross-fitted"),
    ):
        low, high = np.array(stage["interval"]["f1_per_class"], dtype=float).T
        axes.hlines(places + shift, low, high, color=colour, linewidth=2)
        axes.plot(stage["f1_per_class"], places + shift, marker, color=colour, markersize=6, label=name)
    texts = [
        f"{text} (n={rows})" + ("" if number in positive else "*")
        for number, (text, rows) in enumerate(zip(_numbered(names), counts, strict=True))
    ]
    axes.set_yticks(places, texts)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    star = "\n* not a positive label" if len(positive) < len(names) else ""
    axes.set_xlabel(f"F1 (0 to 1), out-of-fold rows;\nbars: 95 % interval over dialogues{star}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


@_as_png
def confusion_matrix(names: Sequence[str], counts: np.ndarray, title: str) -> Any:
    """Where each label's rows went; `counts` is int [c, c], true label by predicted label."""
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    texts = np.full(counts.shape, "", dtype=object)
    for cell in zip(*np.nonzero(counts), strict=True):
        texts[cell] = f"{100 * shares[cell]:.0f} %\n({counts[cell]})"
    bar = "Share of the true label's rows"
    figure, axes = _heatmap(title, _numbered(names), shares, texts, bar, 0.46, 7)
    axes.set(xlabel="Predicted label (number; see the names on the left)", ylabel="True label")
    return figure


@_as_png
def agreement(names: Sequence[str], kappa: np.ndarray) -> Any:
    """Cohen's kappa, float [r, r], between the predictions of every two of r systems."""
    title = "How often two systems choose the same label, beyond chance"
    texts = [[f"{value:.2f}" for value in row] for row in kappa]
    figure, axes = _heatmap(title, _numbered(names, 1), kappa, texts, "Cohen's kappa", 0.5, 10)
    axes.set_xlabel("System (number; see the names on the left)")
    return figure


@_as_png
def reliability_diagram(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, texts: Sequence[str]
) -> Any:
    """How often the most probable label is right, against its probability, in ten bins of equal width.

    `before` and `after` are probabilities [n, c], which `texts` name in the legend; `labels` [n] are the true ones.
    """
    title = "Is the stated probability right? Out-of-fold rows, before and after temperature"
    ratios = {"height_ratios": [3, 1]}
    figure, (axes, histogram) = _figure(title, 6.2, 2, sharex=True, gridspec_kw=ratios)
    axes.plot([0, 1], [0, 1], "--", color=GREY, label="perfectly calibrated")
    edges = np.linspace(0, 1, 11)
    for probabilities, colour, marker, shift, text in (
        (before, BEFORE, "o", -0.02, texts[0]),
        (after, AFTER, "D", 0.02, texts[1]),
    ):
        confidence = probabilities.max(axis=1)
        right = probabilities.argmax(axis=1) == labels
        bins = np.digitize(confidence, edges[1:-1])
        count = np.bincount(bins, minlength=10)
        used = count > 0
        x, y = (np.bincount(bins, of, 10)[used] / count[used] for of in (confidence, right))
        axes.plot(x, y, marker + "-", color=colour, label=text, clip_on=False, zorder=3)
        histogram.bar((edges[:-1] + edges[1:]) / 2 + shift, count, 0.04, color=colour)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="Share of rows that are right")
    axes.grid(color="#DDDDDD")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1))
    histogram.set(xlabel="Probability of the most probable label", ylabel="Rows")
    return figure


@_as_png
def search_curves(curves: Sequence[Curve], cross_fitted: Stage, metric: str, title: str) -> Any:
    """The score against one parameter of the decision at a time, the others as fitted.

    Args:
        curves: (axis text, values [k], in-sample scores [k], the fitted value or None where the rule has none).
        cross_fitted: has the rule's cross-fitted score and its 95 % interval, under `metric`.
        title: the score's, for the axis.
    """
    score, (low, high) = cross_fitted[metric], cross_fitted["interval"][metric]
    heading = "Score against one parameter of the rule, the others held as fitted"
    figure, panels = _figure(heading, 1.1 + 2.6 * len(curves), len(curves))
    for axes, (text, values, scores, fitted) in zip(panels, curves, strict=True):
        legend = f"cross-fitted {score:.3f}, 95 % interval {low:.3f} to {high:.3f}"
        axes.axhspan(low, high, color=AFTER, alpha=0.15, linewidth=0)
        axes.axhline(score, color=AFTER, linestyle="--", label=legend)
        axes.plot(values, scores, color=BEFORE, label="in-sample (tuned on these rows)")
        if fitted is None:
            axes.plot([], [], " ", label="not part of the rule")
        else:
            at = np.interp(fitted, values, scores)
            axes.plot([fitted], [at], "o", color=BEFORE, markersize=8, label=f"fitted value {fitted:.2f}")
        axes.set(xlabel=text, ylabel=title)
        axes.grid(color="#DDDDDD")
        axes.margins(x=0.01)
        axes.legend(loc="best", fontsize=9)
    return figure


@_as_png
def scores_of_systems(figures: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], score: str) -> Any:
    """Every system's scores ([score, low, high], by the keys of `titles`) and their intervals, side by side."""
    styles = {"argmax": "o", "cross_fitted": "D", "test_argmax": "^", "test_rule": "v"}
    shown = [key for key in styles if any(key in of for of in figures.values())]
    figure, (axes,) = _figure(score[0].upper() + score[1:], 1.4 + 0.16 * (len(shown) + 1) * len(figures))
    for number, key in enumerate(shown):
        colour = BEFORE if "argmax" in key else AFTER
        here = [(place, of[key]) for place, of in enumerate(figures.values()) if key in of]
        places = np.array([place for place, _ in here]) + 0.8 * ((number + 0.5) / len(shown) - 0.5)
        for place, (_, value) in zip(places, here, strict=True):
            axes.plot(value[1:], [place] * len(value[1:]), color=colour, linewidth=2, alpha=0.6)
        axes.plot(
            [of[0] for _, of in here], places, styles[key], color=colour, markersize=6, label=titles[key]
        )
    axes.set_yticks(range(len(figures)), [textwrap.fill(name, 28) for name in figures])
    axes.set(ylim=(len(figures) - 0.5, -0.5), xlabel="Score; bars: 95 % interval over dialogues")
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure
