"""Scores of a long-tail classification task in which only some labels count as positive.

The official score of PsyDefDetect (BioNLP 2026) is `macro_f1_positive` over labels 1 to 8 of 9.
"""

import datasets
import evaluate
import numpy as np

from rareturn.decisions.metrics import scores

_DESCRIPTION = """\
Accuracy, and precision, recall and F1 as unweighted means over the positive labels. A row of another label that is
predicted positive still counts against the precision of the label it was given.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions, references (list of int, [n]): predicted and true label numbers, 0 .. num_labels - 1.
    positive_labels (list of int): the labels averaged over; every label but 0 by default.
    num_labels (int): number of labels, 9 by default.
Returns:
    accuracy, macro_f1_positive, macro_precision_positive, macro_recall_positive, macro_f1, weighted_f1 and
    balanced_accuracy (floats in 0 .. 1), kappa (a float up to 1), f1_per_class (list of num_labels floats). A label
    with no row and no prediction scores 0 and is averaged, except in balanced_accuracy.
Examples:
    >>> metric = evaluate.load("metrics/defense_f1")
    >>> scores = metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2], num_labels=3)
    >>> round(scores["macro_f1_positive"], 4)
    0.6667
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DefenseF1(evaluate.Metric):
    def _info(self):
        features = {name: datasets.Value("int64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
            format="numpy",
        )

    def _compute(self, predictions, references, positive_labels=None, num_labels=9):
        labels, last = np.arange(num_labels), num_labels - 1
        positive = list(labels[1:] if positive_labels is None else positive_labels)
        if not positive or len(set(positive)) != len(positive) or not np.isin(positive, labels).all():
            raise ValueError(f"positive_labels: expected distinct labels in 0 .. {last}, not {positive}")
        for name, values in (("predictions", predictions), ("references", references)):
            outside = ~np.isin(values, labels)
            if outside.any():
                row = int(np.argmax(outside))
                raise ValueError(f"{name}[{row}]: {int(values[row])} is not a label in 0 .. {last}")
        return scores(references, predictions, num_labels, positive)
