"""A Ctrl-C that strikes where a function of ours is just called."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest


def interrupt_next_call(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    """Have the next call of it in this thread raise KeyboardInterrupt; those after it are as ever.

    No trace function does so: Python takes away one that raises, and with it whatever traced before, as the measuring of coverage does.
    """
    function, thread = getattr(place, name), threading.current_thread()
    strikes = iter([KeyboardInterrupt])

    def struck(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is thread:
            for strike in strikes:
                raise strike
        return function(*args, **kwargs)

    async def struck_at_its_first_step(*args: Any, **kwargs: Any) -> Any:
        return await struck(*args, **kwargs)

    monkeypatch.setattr(place, name, struck_at_its_first_step if inspect.iscoroutinefunction(function) else struck)
