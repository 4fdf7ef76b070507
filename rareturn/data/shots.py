"""Examples for a prompt, from the rows that a fold's model would be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rareturn.data.dialogues import Row

CHUNK = 256  # rows whose similarities to all others are in memory at a time


def balanced_shots(rows: Sequence[Row], pool: Sequence[Row], count: int, seed: int) -> list[list[Row]]:
    """For each row `count` rows of `pool`, label by label in turn, none of them from the row's own dialogue.

    Which ones is up to `seed`: they are the same for all rows, except for those whose own dialogue would be among them.
    Fewer where the pool has no more.
    """
    rng = np.random.default_rng(seed)
    shuffled = [pool[index] for index in rng.permutation(len(pool))]
    labels = list(dict.fromkeys(row.label for row in shuffled))

    def without(dialogue: str | None) -> list[Row]:
        queues = [
            [row for row in shuffled if row.label == label and row.dialogue_id != dialogue]
            for label in labels
        ]
        rounds = (queue[turn] for turn in range(count) for queue in queues if turn < len(queue))
        return [row for _, row in zip(range(count), rounds, strict=False)]

    same = without(None)
    known = dict.fromkeys((row.dialogue_id for row in rows), same)
    known |= {name: without(name) for name in {shot.dialogue_id for shot in same} & known.keys()}
    return [known[row.dialogue_id] for row in rows]


def similar_shots(rows: Sequence[Row], pool: Sequence[Row], count: int) -> Iterator[list[Row]]:
    """For each row `count` rows of `pool`, one a dialogue, the most similar last; none from the row's own dialogue.

    Two rows are as similar as their dialogues up to the target: the cosine of tf-idf vectors fitted on the pool.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    def texts(of: Sequence[Row]) -> Iterator[str]:
        return (" ".join(turn.text for turn in row.turns) for row in of)

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+|[^\w\s]+")
    known = vectorizer.fit_transform(texts(pool))
    for begin in range(0, len(rows), CHUNK):
        chunk = rows[begin : begin + CHUNK]
        similarity = (vectorizer.transform(texts(chunk)) @ known.T).toarray()
        for row, order in zip(chunk, np.argsort(-similarity, axis=1, kind="stable"), strict=True):
            found: dict[str, Row] = {}
            for index in order:
                if len(found) == count:
                    break
                if pool[index].dialogue_id != row.dialogue_id:
                    found.setdefault(pool[index].dialogue_id, pool[index])
            yield list(found.values())[::-1]
