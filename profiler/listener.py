"""The interface for progress reports of a session."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """Told how a session gets on. Work is counted in tokens to read."""

    def doing(self, what: str) -> None:
        """What is under way now."""

    def say(self, line: str) -> None:
        """A line worth keeping."""

    def advance(self, work: float) -> None:
        """That much work is done."""

    def reach(self, done: float) -> None:
        """Work up to here is done or turned out not to be needed."""


class Silent:
    """A listener that says nothing."""

    def doing(self, what: str) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def advance(self, work: float) -> None:
        """Nothing."""

    def reach(self, done: float) -> None:
        """Nothing."""
