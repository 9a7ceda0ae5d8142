"""Sagas that are interrupted twice each, at random moments: python -m tests.scripts.struck_at_random SEED ROUNDS.

Exits with 0 when after each of them, and after resuming those that were left as if killed, the world and the report agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import time
from types import FrameType

from stageflow.api import Pipeline

from saga import FailFast, MemoryLedger, Retry, SagaCoordinator, SagaReport
from tests import world as world_module
from tests.world import DIAMOND, Script, World, scene

LONGEST = 0.03
PATIENCE = 2.0
A_MOMENT = 0.0001


class Interrupter:
    """Sends SIGINT at some moments; the third one only after so long that the loop must be hanging."""

    def __init__(self, *moments: float) -> None:
        self.waits = [*moments, PATIENCE]
        signal.signal(signal.SIGALRM, self.strike)
        # A strike while asyncio puts it back would leave the handler of the loop before.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def strike(self, _: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename == world_module.__file__:
            # The world is elsewhere: no signal of this process strikes it in the middle of a change.
            signal.setitimer(signal.ITIMER_REAL, A_MOMENT)
            return
        self.arm()
        signal.raise_signal(signal.SIGINT)

    def arm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self.waits.pop(0) if self.waits else 0)

    def disarm(self) -> None:
        self.waits.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupted(coordinator: SagaCoordinator, pipeline: Pipeline, *moments: float) -> None:
    interrupter = Interrupter(*moments)

    async def main() -> SagaReport:
        interrupter.arm()
        return await coordinator.run(pipeline, saga_id="s")

    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(main())
        finally:
            interrupter.disarm()
    interrupter.disarm()


async def afterwards(ledger: MemoryLedger, pipeline: Pipeline) -> SagaReport | None:
    """What becomes of the saga in another process: its ledger is read there, and whoever held the lease is gone."""
    events = await ledger.read("s")
    if not events:
        return None
    copy = MemoryLedger()
    token = await copy.create("s", "gone", events[:1])
    await copy.append("s", events[1:], expected_version=1, token=token, release=True)
    coordinator = SagaCoordinator(ledger=copy)
    if (await coordinator.report("s")).ended_at is None:
        await coordinator.resume("s", pipeline)
    return await coordinator.report("s")


def check(world: World, report: SagaReport | None) -> None:
    refusals = [refusal for refusal in world.refusals if not refusal.endswith("was interrupted")]
    assert not refusals, refusals
    if report is None:
        assert not world.log
        return
    assert report.clean, report
    assert set(report.kept) == set(world.standing), (report, world.log)


def main(seed: int, rounds: int) -> None:
    chance = random.Random(seed)
    slowest = 0.0
    # What a first saga imports is imported: of a strike before any saga begins Python 3.11 may make a RuntimeError.
    asyncio.run(SagaCoordinator().run(scene(DIAMOND)[1]))
    for _ in range(rounds):
        scripts = {name: Script(before=0.001, undo_takes=0.001, undo_fails=name == "b", undo_bears_repetition=True) for name in DIAMOND}
        scripts["d"] = Script(chance.choice(("ok", "raise")), before=0.001)
        world, pipeline = scene(DIAMOND, scripts, dict.fromkeys(DIAMOND, "probed"))
        ledger = MemoryLedger()
        began = time.monotonic()
        interrupted(
            SagaCoordinator(FailFast(retry=Retry(attempts=2)), ledger=ledger), pipeline, *(chance.uniform(0, LONGEST) for _ in "12")
        )
        slowest = max(slowest, time.monotonic() - began)
        # What ran in the process that is gone runs no more.
        world.running.clear()
        world.undoing.clear()
        check(world, asyncio.run(afterwards(ledger, pipeline)))
    sys.stdout.write(f"{slowest:.3f}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
