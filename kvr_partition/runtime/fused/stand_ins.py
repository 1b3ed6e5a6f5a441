"""Other functions in the place of modules' ``forward``, for a while, and for one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def standing_in(stand_ins: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, calls of these modules go to functions; those of other threads go where they went before.

    It is the instance that is changed, and nothing of its class.
    """
    before = {module: module.__dict__.get("forward") for module in stand_ins}
    try:
        for module, forward in stand_ins.items():
            module.__dict__["forward"] = _here_only(
                forward, before[module] or type(module).forward.__get__(module)
            )
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _here_only(here: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    def forward(*args: Any, **given: Any) -> Any:
        return (here if threading.get_ident() == thread else elsewhere)(*args, **given)

    return forward
