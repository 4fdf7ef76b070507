"""The report's pictures, each as the bytes of a PNG file: equal input gives equal bytes.

Blue and orange stand for before and after throughout; they stay apart for colour-blind readers and in grey print.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
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
Interval = tuple[float, float]


def _as_png(draw: Callable[..., Any]) -> Callable[..., bytes]:
    """Let a function that draws a figure return its PNG file, drawn in `STYLE`."""

    @functools.wraps(draw)
    def png(*arguments, **options) -> bytes:
        import matplotlib

        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            # The layout is made with a first guess at the tick labels; the tight box keeps what grew since.
            figure = draw(*arguments, **options)
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
    title: str,
    names: Sequence[str],
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    bar: str,
    *,
    first: int,
    height: float,
    fontsize: int,
) -> tuple[Any, Any]:
    """A square of values from 0 to 1 with a text in each cell; rows have names, columns their numbers."""
    figure, (axes,) = _figure(title, 2.0 + height * len(names))
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        colour = "white" if values[row, column] > 0.55 else "black"
        style = {"ha": "center", "va": "center", "color": colour, "fontsize": fontsize}
        axes.text(column, row, texts[row][column], **style)
    places = range(len(names))
    axes.set_yticks(places, _numbered(names, first))
    axes.set_xticks(places, [str(first + place) for place in places])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=bar, shrink=0.8)
    return figure, axes


@_as_png
def per_class_f1(
    label_names: Sequence[str],
    rows_per_class: Sequence[int],
    before: tuple[Sequence[float], Sequence[Interval]],
    after: tuple[Sequence[float], Sequence[Interval]],
    positive_labels: Sequence[int],
) -> Any:
    """F1 of every label: scores [c] and their 95 % intervals [c] before and after the decision.

    Labels outside `positive_labels` are marked, since the macro scores leave them out.
    """
    figure, (axes,) = _figure(
        "F1 of each label before and after the decision rule", 1.5 + 0.5 * len(label_names)
    )
    places = np.arange(len(label_names))
    for (values, intervals), colour, marker, shift, name in (
        (before, BEFORE, "o", -0.14, "argmax"),
        (after, AFTER, "D", 0.14, "decision rule, cross-fitted"),
    ):
        low, high = np.array(intervals, dtype=float).T
        axes.hlines(places + shift, low, high, color=colour, linewidth=2)
        axes.plot(values, places + shift, marker, color=colour, markersize=6, label=name)
    texts = [
        f"{text} (n={rows})" + ("" if number in positive_labels else "*")
        for number, (text, rows) in enumerate(zip(_numbered(label_names), rows_per_class, strict=True))
    ]
    axes.set_yticks(places, texts)
    axes.set(xlim=(0, 1), ylim=(len(label_names) - 0.5, -0.5))
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    star = "\n* not a positive label" if len(positive_labels) < len(label_names) else ""
    axes.set_xlabel(f"F1 (0 to 1), out-of-fold rows;\nbars: 95 % interval over dialogues{star}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


@_as_png
def confusion_matrix(label_names: Sequence[str], counts: np.ndarray, title: str) -> Any:
    """Where each label's rows went; `counts` is int [c, c], true label by predicted label."""
    counts = np.asarray(counts)
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    texts = [
        [f"{100 * share:.0f} %\n({count})" if count else "" for share, count in zip(*of_row, strict=True)]
        for of_row in zip(shares, counts, strict=True)
    ]
    bar = "Share of the true label's rows"
    figure, axes = _heatmap(title, label_names, shares, texts, bar, first=0, height=0.46, fontsize=7)
    axes.set(xlabel="Predicted label (number; see the names on the left)", ylabel="True label")
    return figure


@_as_png
def agreement(names: Sequence[str], kappa: np.ndarray) -> Any:
    """Cohen's kappa, float [r, r], between the predictions of every two of r systems."""
    title = "How often two systems choose the same label, beyond chance"
    texts = [[f"{value:.2f}" for value in row] for row in kappa]
    figure, axes = _heatmap(
        title, names, np.asarray(kappa), texts, "Cohen's kappa", first=1, height=0.5, fontsize=10
    )
    axes.set_xlabel("System (number; see the names on the left)")
    return figure


@_as_png
def reliability_diagram(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, texts: tuple[str, str], num_bins: int = 10
) -> Any:
    """How often the most probable label is right, against its probability, in `num_bins` bins of equal width.

    Args:
        before, after: probabilities [n, c]; `texts` name them in the legend.
        labels: true labels [n].
    """
    edges = np.linspace(0, 1, num_bins + 1)
    figure, (axes, histogram) = _figure(
        "Is the stated probability right? Out-of-fold rows, before and after temperature",
        6.2,
        2,
        sharex=True,
        gridspec_kw={"height_ratios": [3, 1]},
    )
    axes.plot([0, 1], [0, 1], "--", color=GREY, label="perfectly calibrated")
    for probabilities, colour, marker, shift, text in (
        (before, BEFORE, "o", -0.2, texts[0]),
        (after, AFTER, "D", 0.2, texts[1]),
    ):
        confidence = probabilities.max(axis=1)
        right = probabilities.argmax(axis=1) == labels
        bins = np.clip(np.digitize(confidence, edges[1:-1]), 0, num_bins - 1)
        count = np.bincount(bins, minlength=num_bins)
        used = count > 0
        x = np.bincount(bins, confidence, num_bins)[used] / count[used]
        y = np.bincount(bins, right, num_bins)[used] / count[used]
        axes.plot(x, y, marker + "-", color=colour, label=text, clip_on=False, zorder=3)
        centre = (edges[:-1] + edges[1:]) / 2
        histogram.bar(centre + shift / num_bins, count, 0.4 / num_bins, color=colour)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="Share of rows that are right")
    axes.grid(color="#DDDDDD")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1))
    histogram.set(xlabel="Probability of the most probable label", ylabel="Rows")
    return figure


@_as_png
def search_curves(
    curves: Sequence[tuple[str, np.ndarray, np.ndarray, float | None]],
    cross_fitted: tuple[float, Interval],
    metric: str,
) -> Any:
    """The score against one parameter of the decision at a time, the others as fitted.

    Args:
        curves: (axis text, values [k], in-sample scores [k], the fitted value or None where the rule has none).
        cross_fitted: the rule's cross-fitted score and its 95 % interval.
        metric: the score's name.
    """
    score, (low, high) = cross_fitted
    title = "Score against one parameter of the rule, the others held as fitted"
    figure, panels = _figure(title, 1.1 + 2.6 * len(curves), len(curves))
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
        axes.set(xlabel=text, ylabel=metric)
        axes.grid(color="#DDDDDD")
        axes.margins(x=0.01)
        axes.legend(loc="best", fontsize=9)
    return figure
