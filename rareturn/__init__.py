"""Long-tail dialogue utterance classification: what the scripts share, and a published ensemble as an object."""

from __future__ import annotations

from typing import Any

__all__ = ["DialogueClassifier"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when it is asked for: it brings torch and transformers with it
        from rareturn.classifier import DialogueClassifier

        return DialogueClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
