"""Scripts as a user runs them, in this process, where the imports are paid once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from rareturn.command_line import run


def words_of(**flags: object) -> list[str]:
    """The words of a command line: True is a bare flag, None is left out, a list gives several values."""
    words: list[str] = []
    for name, value in flags.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def run_script(main: Callable[[], None], *words: object, **flags: object) -> int:
    """The exit status of `python SCRIPT words flags`."""
    argv, sys.argv = sys.argv, [f"{main.__module__}.py", *map(str, words), *words_of(**flags)]
    try:
        run(main)
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = argv
    return 0


@contextlib.contextmanager
def sigterm_in_step(step: int) -> Iterator[None]:
    """`run_classification.py` in this process gets a SIGTERM within an optimizer step, counted from 1."""
    import run_classification

    trainer = run_classification.weighted_trainer()
    whole = trainer.training_step

    def training_step(self, *arguments, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *arguments, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", training_step)
        yield
