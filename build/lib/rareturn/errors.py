"""A mistake in what the user gave, and how it is said."""

from __future__ import annotations


class InputError(Exception):
    """A mistake in what the user gave: a line a problem, shown without a traceback; the script exits with status 2."""

    shown = 20

    def __init__(self, *problems: str):
        self.problems = [" ".join(str(problem).split()) for problem in problems]
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The lines a user sees: at most `shown` problems and, where there are more, how many more."""
        rest = len(self.problems) - self.shown
        return self.problems[: self.shown] + ([f"... and {rest} more like these"] if rest > 0 else [])


def first_line(error: Exception) -> str:
    """An error's first line that says something, for a message of one line; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
