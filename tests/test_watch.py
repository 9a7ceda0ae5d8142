"""The tasks in which a saga runs: they begin, they end, and nobody waits for them in vain."""

from __future__ import annotations

import asyncio
import gc
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from saga import LedgerError, tasks
from saga.tasks import Answer, outlast, outlasting, start
from saga.watch import Crew, Employer, Watched
from tests.controlled import ControlledLoop, elapse, run


class Notes(Employer):
    """Notes what breaks; the first time, something strikes it there."""

    def __init__(self, strike: BaseException | None = None) -> None:
        self.broken: list[Exception] = []
        self._strike = strike

    def gives_up(self, _member: object, /) -> None:
        raise AssertionError("nobody was given up")

    def breaks(self, error: Exception, /) -> None:
        self.broken.append(error)
        if self._strike is not None and len(self.broken) == 1:
            raise self._strike


def crew_of(*work: Coroutine[Any, Any, None], employer: Employer) -> Crew[Watched]:
    crew: Crew[Watched] = Crew()
    for each in work:
        crew.employ(Watched(employer), each)
    return crew


def left_by(strike: type[BaseException], main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it, and see that this leaves the loop."""
    with pytest.raises(strike), asyncio.Runner(loop_factory=ControlledLoop) as runner:
        runner.run(main())


def test_a_task_of_ours_says_by_its_name_whose_it_is() -> None:
    async def play() -> str:
        task = start(asyncio.sleep(0))
        await task
        return task.get_name()

    assert run(play()) == "saga"


def test_a_task_that_is_cancelled_before_it_begins_begins_all_the_same() -> None:
    begun: list[int] = []

    async def begin() -> None:
        task = asyncio.current_task()
        assert task is not None
        begun.append(task.cancelling())

    async def play() -> None:
        task = start(begin())
        task.cancel()
        await task

    run(play())

    assert begun == [1]


def test_a_task_that_a_ctrl_c_strikes_before_it_begins_begins_all_the_same_and_lets_it_out_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In uvloop a signal strikes the first code of Python's that runs again: often that of a task at its first step."""
    begun: list[str] = []

    async def begin() -> None:
        begun.append("begun")

    @types.coroutine
    def first_step() -> Generator[None, None, None]:
        yield
        raise KeyboardInterrupt

    async def play() -> None:
        monkeypatch.setattr(tasks, "_first_step", first_step)
        await start(begin())

    left_by(KeyboardInterrupt, play)

    assert begun == ["begun"]


def test_whoever_outlasts_tasks_is_held_by_them_however_often_it_is_cancelled() -> None:
    async def wait() -> float:
        await outlast([start(elapse(3)), start(elapse(5))])
        return asyncio.get_running_loop().time()

    async def play() -> float:
        waiting = asyncio.create_task(wait())
        for _ in range(4):
            await elapse(1)
            waiting.cancel()
        return await waiting

    assert run(play()) == 5


@pytest.mark.parametrize("strike", [KeyboardInterrupt, SystemExit])
def test_what_tells_the_process_to_end_leaves_the_loop_once_and_not_again_through_whoever_waits(strike: type[BaseException]) -> None:
    seen: list[str] = []

    async def struck() -> None:
        raise strike

    async def play() -> None:
        task = start(struck())
        # The loop is left before this is over; what is left in it is cancelled, and awaited to its end.
        await outlast([task])
        await outlast([start(elapse(5))])
        seen.append(str(task.exception()))

    left_by(strike, play)

    assert seen == [f"the saga was cut short by a {strike.__name__}: it is left as if its process had been killed, resume it"]


def test_a_crew_is_held_by_nobody_who_has_died() -> None:
    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    async def play() -> list[Exception]:
        notes = Notes()
        await crew_of(cancels_itself(), elapse(3), employer=notes).disband(notes)
        assert asyncio.get_running_loop().time() == 3
        return notes.broken

    (broken,) = run(play())

    assert "CancelledError" in str(broken)


def test_a_crew_notices_who_was_killed_before_it_could_be_dismissed() -> None:
    notes = Notes(strike=KeyboardInterrupt())

    async def fails() -> None:
        raise OSError

    async def play() -> None:
        await crew_of(fails(), employer=notes).disband(notes)

    left_by(KeyboardInterrupt, play)

    assert [type(error) for error in notes.broken] == [OSError, LedgerError]


def test_whoever_waits_for_a_crew_goes_on_waiting_when_a_ctrl_c_strikes() -> None:
    notes = Notes()
    ended: list[float] = []

    async def wait() -> None:
        crew = crew_of(elapse(3), employer=notes)

        def strike() -> None:
            # As one in the step in which the wait is resumed would.
            assert crew._turn is not None  # the crew is waited for
            crew._turn.set_exception(KeyboardInterrupt())

        asyncio.get_running_loop().call_later(1, strike)
        await crew.disband(notes)
        ended.append(asyncio.get_running_loop().time())

    async def play() -> None:
        await outlast([start(wait())])

    left_by(KeyboardInterrupt, play)

    assert "KeyboardInterrupt" in str(notes.broken[0])
    assert len(ended) == 1


@pytest.mark.parametrize("moment", ["before the answer", "with the answer", "twice before"])
@pytest.mark.parametrize("answer", [7, LedgerError("no room")], ids=["a value", "an error"])
def test_an_answer_comes_also_to_whoever_was_cancelled(moment: str, answer: int | LedgerError) -> None:
    async def play() -> tuple[list[object], int]:
        asked: Answer[int] = Answer(loop=asyncio.get_running_loop())
        got: list[object] = []

        async def wait() -> None:
            try:
                value: int = await outlasting(asked)
                got.append(value)
            except LedgerError as error:
                got.append(error)

        task = start(wait())
        await elapse(1)
        if moment == "with the answer":
            asked.give(answer)
        task.cancel()
        if moment == "twice before":
            await elapse(1)
            task.cancel()
        await elapse(1)
        asked.give(answer)
        asked.give(8)
        await outlast([task])
        return got, task.cancelling()

    got, cancels = run(play())

    assert got == [answer]
    assert cancels == (2 if moment == "twice before" else 1)


def test_nobody_complains_of_an_error_that_comes_to_whoever_was_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        asked: Answer[int] = Answer(loop=asyncio.get_running_loop())
        asked.cancel()
        asked.give(LedgerError("no room"))
        del asked
        gc.collect()

    run(play())

    assert not caplog.records


def test_whoever_waits_for_a_crew_hears_of_a_member_that_was_killed_before_it_was_dismissed() -> None:
    notes = Notes()

    async def killed() -> None:
        raise OSError("struck")

    async def play() -> None:
        until = asyncio.Event()

        async def works() -> None:
            await until.wait()

        crew = crew_of(works(), employer=notes)
        [member] = crew.members
        member.successor = asyncio.ensure_future(killed())
        await outlast({member.successor})
        await crew.disband(notes)
        until.set()
        await outlast({member.task})

    run(play())

    assert [str(error) for error in notes.broken] == ["struck"]
