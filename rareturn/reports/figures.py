"""The report's pictures, each as the bytes of a PNG file: equal input gives equal bytes.

Blue and orange stand for before and after throughout; they stay apart for colour-blind readers and in grey print.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

BEFORE, AFTER, GREY = "#0072B2", "#D55E00", "#666666"


# Inches. Narrow, so that the text is still legible where a phone shows the whole width.
WIDTH = 6.2


STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def label_texts(label_names: Sequence[str], width: int = 22) -> list[str]:
    """`number name`, as axes and tables show a label, wrapped to `width` characters a line."""
    return [textwrap.fill(f"{number} {name}", width) for number, name in enumerate(label_names)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # The constrained layout knows tick labels by their first guess; what they grew by since would be cut off.
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight")
    return buffer.getvalue()


def _figure(height: float, rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **options)[:, 0]


def per_class_f1(
    label_names: Sequence[str],
    rows_per_class: Sequence[int],
    before: tuple[Sequence[float], Sequence[tuple[float, float]]],
    after: tuple[Sequence[float], Sequence[tuple[float, float]]],
    positive_labels: Sequence[int],
    names: tuple[str, str] = ("argmax", "decision rule, cross-fitted"),
) -> bytes:
    """F1 of every label before and after the decision.

    Args:
        rows_per_class: true rows of each label.
        before, after: the scores [c] and their 95 % intervals [c].
        positive_labels: the labels that count in the macro scores; the others are marked.
        names: what `before` and `after` are, for the legend.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(1.5 + 0.5 * len(label_names))
        places = np.arange(len(label_names))
        for (values, intervals), colour, marker, shift, name in (
            (before, BEFORE, "o", -0.14, names[0]),
            (after, AFTER, "D", 0.14, names[1]),
        ):
            low, high = np.array(intervals, dtype=float).T
            axes.hlines(places + shift, low, high, color=colour, linewidth=2)
            axes.plot(values, places + shift, marker, color=colour, markersize=6, label=name)
        texts = [
            f"{text} (n={rows})" + ("" if number in positive_labels else "*")
            for number, (text, rows) in enumerate(zip(label_texts(label_names), rows_per_class, strict=True))
        ]
        axes.set_yticks(places, texts)
        axes.set_ylim(len(label_names) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(axis="x", color="#DDDDDD")
        axes.set_axisbelow(True)
        star = "\n* not a positive label" if len(positive_labels) < len(label_names) else ""
        axes.set_xlabel(f"F1 (0 to 1), out-of-fold rows;\nbars: 95 % interval over dialogues{star}")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        figure.suptitle("F1 of each label before and after the decision rule", fontsize=11)
        return _png(figure)


def confusion_matrix(label_names: Sequence[str], counts: np.ndarray, title: str) -> bytes:
    """Where each label's rows went.

    Args:
        counts: int [c, c], true label by predicted label.
    """
    counts = np.asarray(counts)
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(2.0 + 0.46 * len(label_names))
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for true, predicted in np.ndindex(counts.shape):
            if counts[true, predicted]:
                axes.text(
                    predicted,
                    true,
                    f"{100 * shares[true, predicted]:.0f} %\n({counts[true, predicted]})",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if shares[true, predicted] > 0.55 else "black",
                )
        axes.set_yticks(range(len(label_names)), label_texts(label_names))
        axes.set_xticks(range(len(label_names)), [str(number) for number in range(len(label_names))])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("True label")
        axes.set_xlabel("Predicted label (number; the names stand on the left)")
        figure.colorbar(image, ax=axes, label="Share of the true label's rows", shrink=0.8)
        figure.suptitle(title, fontsize=11)
        return _png(figure)


def reliability_diagram(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, texts: tuple[str, str], num_bins: int = 10
) -> bytes:
    """How often the most probable label is right, against how probable it was said to be.

    Args:
        before, after: probabilities [n, c].
        labels: true labels [n].
        texts: what `before` and `after` are (with their ECE), for the legend.
        num_bins: equal-width bins of confidence.
    """
    edges = np.linspace(0, 1, num_bins + 1)
    with matplotlib.rc_context(STYLE):
        figure, (axes, histogram) = _figure(6.2, 2, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
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
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.grid(color="#DDDDDD")
        axes.set_ylabel("Share of rows that are right")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1))
        histogram.set_ylabel("Rows")
        histogram.set_xlabel("Probability of the most probable label")
        figure.suptitle(
            "Is the stated probability right? Out-of-fold rows, before and after temperature", fontsize=11
        )
        return _png(figure)


def search_curves(
    curves: Sequence[tuple[str, np.ndarray, np.ndarray, float | None]],
    cross_fitted: tuple[float, tuple[float, float]],
    metric: str,
) -> bytes:
    """The score against one parameter of the decision at a time, the others as fitted.

    Args:
        curves: (axis text, values [k], in-sample scores [k], the fitted value or None where the rule has none).
        cross_fitted: the rule's cross-fitted score and its 95 % interval.
        metric: the score's name.
    """
    score, (low, high) = cross_fitted
    text_of_cross_fitted = f"cross-fitted {score:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(1.1 + 2.6 * len(curves), len(curves))
        for axes, (text, values, scores, fitted) in zip(panels, curves, strict=True):
            axes.axhspan(low, high, color=AFTER, alpha=0.15, linewidth=0)
            axes.axhline(score, color=AFTER, linestyle="--", label=text_of_cross_fitted)
            axes.plot(values, scores, color=BEFORE, label="in-sample (tuned on these rows)")
            if fitted is None:
                axes.plot([], [], " ", label="not part of the rule")
            else:
                at = np.interp(fitted, values, scores)
                axes.plot([fitted], [at], "o", color=BEFORE, markersize=8, label=f"fitted value {fitted:.2f}")
            axes.set_xlabel(text)
            axes.set_ylabel(metric)
            axes.grid(color="#DDDDDD")
            axes.margins(x=0.01)
            axes.legend(loc="best", fontsize=9)
        figure.suptitle("Score against one parameter of the rule, the others held as fitted", fontsize=11)
        return _png(figure)


def agreement(names: Sequence[str], kappa: np.ndarray) -> bytes:
    """Cohen's kappa between the predictions of every two systems.

    Args:
        names: r names.
        kappa: float [r, r].
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(2.0 + 0.5 * len(names))
        image = axes.imshow(kappa, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, column in np.ndindex(np.shape(kappa)):
            colour = "white" if kappa[row, column] > 0.55 else "black"
            axes.text(column, row, f"{kappa[row, column]:.2f}", ha="center", va="center", color=colour)
        axes.set_yticks(
            range(len(names)), [textwrap.fill(f"{number} {name}", 22) for number, name in enumerate(names, 1)]
        )
        axes.set_xticks(range(len(names)), [str(number) for number in range(1, len(names) + 1)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("System (number; the names stand on the left)")
        figure.colorbar(image, ax=axes, label="Cohen's kappa", shrink=0.8)
        figure.suptitle("How often two systems choose the same label, beyond chance", fontsize=11)
        return _png(figure)
