"""Long-tail dialogue utterance classification: what the scripts share, and a published ensemble as an object."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["DialogueClassifier"]

# transformers' Trainer and PEFT import bitsandbytes, which warns on processors with bf16 units that a package with a
# faster 4-bit CPU kernel is missing. Nothing here uses that kernel; see `models.loading`.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when it is asked for: it brings torch and transformers with it
        from rareturn.classifier import DialogueClassifier

        return DialogueClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
