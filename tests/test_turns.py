"""Whoever waits some turns of an event loop is woken when they are over, at the cost of one callback a turn."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable

import pytest

from saga.turns import PATIENCE, Turns, turns


def waker(woken: list[str], name: str) -> Callable[[], None]:
    return lambda: woken.append(name)


async def pass_turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_who_waits_is_woken_when_the_turns_are_over_and_not_before() -> None:
    woken: list[str] = []

    async def scene() -> None:
        counted = Turns()
        counted.wait(waker(woken, "first"))
        await pass_turns(3)
        counted.wait(waker(woken, "second"))
        await pass_turns(PATIENCE - 4)
        assert woken == []
        await pass_turns(1)
        assert woken == ["first"]
        await pass_turns(3)

    asyncio.run(scene())

    assert woken == ["first", "second"]


def test_what_is_called_off_is_not_called_and_may_be_waited_for_again() -> None:
    woken: list[str] = []

    async def scene() -> None:
        counted = Turns()
        wake = waker(woken, "late")
        counted.wait(wake)
        counted.call_off(wake)
        counted.call_off(wake)
        await pass_turns(2 * PATIENCE)
        assert woken == []
        counted.wait(wake)
        await pass_turns(PATIENCE + 1)

    asyncio.run(scene())

    assert woken == ["late"]


def test_a_loop_on_which_nobody_waits_any_more_comes_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_soon", lambda callback, *_, **__: calls.append(callback))
        counted = Turns()
        for name in "abc":
            counted.wait(waker([], name))
        assert len(calls) == 1
        counted._due.clear()
        counted._count()
        assert len(calls) == 1
        monkeypatch.undo()

    asyncio.run(scene())


def test_each_loop_has_turns_of_its_own_and_they_go_with_it() -> None:
    async def own() -> Turns:
        assert turns() is turns()
        turns().wait(waker([], "never"))
        return turns()

    first, second = asyncio.run(own()), asyncio.run(own())

    assert first is not second
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
