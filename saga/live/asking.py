"""Asking the outside world whether a stage's effect landed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from stageflow.api import StageOutput, StageStatus

from saga.events import StageProbed
from saga.failures import Failure, FailureKind
from saga.outputs import copied_output
from saga.storable import refuse_unstorable
from saga.tasks import closes, this_task
from saga.text import shown
from saga.watch import bounded

if TYPE_CHECKING:
    from saga.live.saga import LiveSaga


async def ask(saga: LiveSaga, stage: str, *, stop: asyncio.Future[None] | None = None) -> StageOutput | None:
    """Ask the stage's probe, with the compensation's retry and timeout; the answer is in the ledger when this returns.

    Args:
        saga: The saga.
        stage: The stage to ask for.
        stop: When it is done, nobody waits for the answer any more; it is asked again when the saga has come so far.

    Returns:
        The output if the effect landed; None if it did not, or if the probe failed for good: so does one whose output a durable
        ledger can't keep.
    """
    settings = saga.blueprint.stages[stage].undone_under(saga.policy.compensation)
    loop, task = asyncio.get_running_loop(), this_task()
    began, attempt = loop.time(), 0
    while True:
        attempt += 1
        try:
            answer: StageOutput | None = await bounded(
                saga.actions.probe(saga.compensation_context(stage, attempt)),
                seconds=settings.timeout,
                grace=saga.policy.cancel_grace,
                gives_up=saga.keeper.gives_up,
                stop=stop,
            )
            _check(answer)
            if answer is not None:
                # Before it is recorded: a text would come to the compensation in the place of what the probe gave.
                refuse_unstorable(saga.journal.ledger, StageProbed(stage=stage, landed=True, output=answer))
        except BaseException as error:
            if closes(error, task):
                raise
            # A probe's failure is data.
            saga.heed_signal(error)
            if stop is not None and stop.done() and isinstance(error, asyncio.CancelledError):
                message = "the saga stopped before its probe had answered"
                failure = Failure.of(stage, FailureKind.INTERRUPTED, message, attempt=attempt)
            else:
                failure = Failure.raised(stage, error, attempt=attempt, kind=FailureKind.COMPENSATION, of_probe=True)
        else:
            if answer is None:
                # Whatever the stage has asked: the ledger knows of sagas that it ran.
                left_within = await saga.children.left_within(stage)
                await saga.journal.record(StageProbed(stage=stage, landed=False, left_within=left_within))
                return None
            await saga.journal.record(StageProbed(stage=stage, landed=True, output=copied_output(answer)))
            return answer
        wait = settings.retry.wait_before_next(failure, attempt=attempt, elapsed=loop.time() - began)
        if stop is not None and stop.done():
            wait = None
        await saga.journal.record(StageProbed(stage=stage, landed=None, failure=failure, will_retry=wait is not None))
        if wait is None:
            return None
        await _pause(wait, stop)


async def _pause(seconds: float, stop: asyncio.Future[None] | None) -> None:
    # Somebody may cancel every task of the process: then the probe is asked sooner, and the saga still ends.
    with contextlib.suppress(asyncio.CancelledError):
        await (asyncio.sleep(seconds) if stop is None else asyncio.wait({stop}, timeout=seconds))


def _check(answer: object) -> None:
    if answer is not None and not (isinstance(answer, StageOutput) and answer.status is StageStatus.OK):
        raise TypeError(f"expected None or a StageOutput with status OK from the probe, got {shown(answer)}")
