"""What is around each stage where somebody has put it there: the hooks of stageflow's context, and interceptors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

from stageflow.api import StageCancellationRequested, StageContext, StageOutput, StageStatus
from stageflow.pipeline.dag import UnifiedPipelineCancelled
from stageflow.pipeline.interceptors import run_with_interceptors
from stageflow.stages.result import StageResult

from saga.failures import Failure, FailureKind, begin_with_user
from saga.live.saga import has_hooks
from saga.log import LOG
from saga.quick import members
from saga.tasks import closes, cut_short_by, end, leave_loop, sit_out, start
from saga.text import printable

if TYPE_CHECKING:
    from stageflow import BaseInterceptor
    from stageflow.stages.inputs import StageInputs

    from saga.live.saga import LiveSaga

_STATUS: Final = members(StageStatus)
STOPPING: Final = StageOutput.cancel("the saga is stopping")
"""The answer of a stage that has nothing to give to those that depend on it, because the saga is stopping."""


class Stages(Protocol):
    """Whose stages they are, and how their run goes."""

    def given(self, name: str) -> StageOutput | None:
        """What a stage gave that ended well before, in a saga that was resumed; None: it is to run."""
        ...

    def can_be_left_out(self, name: str) -> bool:
        """Whether nothing of the stage can be in effect from an earlier run of the saga."""
        ...

    def begin(self, name: str, inputs: StageInputs) -> None:
        """Start a stage; its schedule is told when it has ended."""
        ...

    def is_stopping(self) -> bool:
        """Whether no further stage starts."""
        ...

    def stop(self, cause: Failure) -> None:
        """Start no further stage; the first cause stays the cause."""
        ...

    def breaks(self, error: Exception, /) -> None:
        """Start no further stage; the run then raises this."""
        ...

    async def refused(self, stage: str, error: BaseException) -> None:
        """Stop because what is around a stage did not let it run, or end."""
        ...

    async def learn(self, name: str, output: StageOutput) -> None:
        """Record a stage that was answered for without having been started."""
        ...


@dataclass(slots=True)
class _Turn:
    """One stage's turn.

    Attributes:
        name: Its name.
        inputs: What it is given.
        given: What it gave before the saga was resumed; None: it is to run.
        task: Goes through what is around it, and waits for it.
        waiter: Done with what the stage has answered; None before it begins.
        is_through: No code of anybody else's runs any more: what it has come to is recorded, which no cancel is to strike.
    """

    name: str
    inputs: StageInputs
    given: StageOutput | None
    task: asyncio.Task[None] = field(init=False)
    waiter: asyncio.Future[StageOutput | Failure] | None = None
    is_through: bool = False


class Around:
    """Has each stage pass what stageflow has around one: hooks, its condition, interceptors; and then those that depend on it go on.

    All of it is somebody else's code, and may fail, cancel itself or never answer. So it runs in a task beside the stage's own, which waits
    for the stage and strikes nothing in it. A saga that stops waits for it no longer than `cancel_grace`.
    """

    def __init__(self, saga: LiveSaga, interceptors: Sequence[BaseInterceptor]) -> None:
        self._saga: Final = saga
        self._interceptors: Final = list(interceptors)
        self._context: Final = saga.private_context()
        self._turns: Final[dict[str, _Turn]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rest: asyncio.Future[None] | None = None

    def let_in(self, stages: Stages, name: str, inputs: StageInputs, given: StageOutput | None, goes_on: Callable[..., bool]) -> None:
        """Begin a stage's turn; `goes_on` is told what it has come to, and says whether others are left."""
        turn = _Turn(name, inputs, given)
        turn.task = start(self._see_through(stages, turn, goes_on))
        self._turns[name] = turn

    def tell(self, name: str, answer: StageOutput | Failure) -> None:
        """Take what a stage has answered to whoever waits for it."""
        turn = self._turns.get(name)
        if turn is not None and turn.waiter is not None and not turn.waiter.done():
            turn.waiter.set_result(answer)

    def stop(self, besides: str | None) -> None:
        """Wait for no stage any more, `besides` the one that is to answer, and for what is around them within the grace."""
        for name in self._turns:
            if name != besides:
                self.tell(name, STOPPING)
        self._timer = self._saga.loop.call_later(self._saga.policy.cancel_grace, self._cut_off)

    async def rest(self, stages: Stages) -> None:
        """Wait until nothing runs around a stage any more, whatever strikes whoever waits."""
        # Asked of the tasks themselves: a Ctrl-C may have killed one before it left.
        while any(not turn.task.done() for turn in self._turns.values()):
            self._rest = self._saga.loop.create_future()
            await sit_out(self._rest, stages.breaks)
        for killed_by in [turn.task.exception() for turn in self._turns.values()]:
            assert killed_by is not None  # or it would have left
            stages.breaks(cut_short_by(killed_by))
        if self._timer is not None:
            self._timer.cancel()

    def _cut_off(self) -> None:
        for turn in self._turns.values():
            if not turn.is_through:
                turn.task.cancel()
        self._timer = self._saga.loop.call_later(self._saga.policy.cancel_grace, self._give_up)

    def _give_up(self) -> None:
        for turn in [turn for turn in self._turns.values() if not turn.is_through]:
            LOG.warning("saga %s: what is around stage %r ignores its cancel", printable(self._saga.id), printable(turn.name))
            self._saga.keeper.gives_up(turn.task)
            self._leaves(turn.name)

    def _leaves(self, name: str) -> None:
        self._turns.pop(name, None)
        if self._rest is not None:
            end(self._rest)

    # -- a stage's turn ------------------------------------------------------------------------------------------

    async def _see_through(self, stages: Stages, turn: _Turn, goes_on: Callable[..., bool]) -> None:
        try:
            await self._go_through(stages, turn, goes_on)
        except asyncio.CancelledError:
            if not stages.is_stopping():
                self._saga.stop_for_cancel()
        except BaseException as error:
            if closes(error, turn.task):
                raise
            leave_loop(error)
            stages.breaks(cut_short_by(error))
        self._leaves(turn.name)

    async def _go_through(self, stages: Stages, turn: _Turn, goes_on: Callable[..., bool]) -> None:
        passed = await self._passed(stages, turn)
        turn.is_through = True
        if passed is None or turn.name not in self._turns:
            return
        if not isinstance(passed, StageOutput):
            await stages.refused(turn.name, passed)
            return
        if turn.waiter is None:
            await stages.learn(turn.name, passed)
        if goes_on(stages, turn.name, passed) and self._context.is_canceled:
            self._called_off(stages, self._context.cancellation_reason)

    def _called_off(self, stages: Stages, reason: str | None) -> None:
        stages.stop(Failure.of(None, FailureKind.CANCELLED, reason or "the context was cancelled"))

    async def _passed(self, stages: Stages, turn: _Turn) -> StageOutput | BaseException | None:
        """What those that depend on the stage are given, or what did not let it run or end; None: nothing, for the saga stops."""
        try:
            if has_hooks(self._context) and not stages.is_stopping():
                await self._call_hooks(turn)
            if self._context.is_canceled:
                self._called_off(stages, self._context.cancellation_reason)
            if stages.is_stopping():
                return None
            if self._interceptors and not self._is_skipped(stages, turn):
                output = await self._intercepted(stages, turn)
            else:
                output = _output_of(await self._answer(stages, turn))
        except (StageCancellationRequested, UnifiedPipelineCancelled) as off:
            # By a hook, or by the pipeline that one has run.
            self._called_off(stages, off.reason)
            return None
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if closes(error, turn.task):
                raise
            return error
        return None if isinstance(output, StageOutput) and output.status is _STATUS.CANCEL else output

    async def _call_hooks(self, turn: _Turn) -> None:
        saga, context = self._saga, self._context
        told = StageContext(
            snapshot=saga.snapshot,
            inputs=turn.inputs,
            stage_name=turn.name,
            timer=saga.timer,
            event_sink=saga.event_sink,
            _cancellation_probe=lambda: context.is_canceled or saga.is_cancelled(),
            _cancellation_reason_provider=lambda: context.cancellation_reason or saga.why_cancelled(),
        )
        kind = saga.blueprint.stages[turn.name].spec.kind
        await context.run_before_stage_start_hooks(stage_name=turn.name, stage_kind=kind, stage_ctx=told)

    def _is_skipped(self, stages: Stages, turn: _Turn) -> bool:
        """Whether its condition skips it, of which stageflow tells no interceptor."""
        if not self._saga.blueprint.stages[turn.name].spec.conditional:
            return False
        if turn.given is None and not stages.can_be_left_out(turn.name):
            return False
        try:
            return bool(turn.inputs.get("skip_reason"))
        except Exception:  # noqa: BLE001 - what can be neither true nor false is refused where the stage begins
            return True

    def _answer(self, stages: Stages, turn: _Turn) -> asyncio.Future[StageOutput | Failure]:
        """What the stage answers, which begins if it is to run."""
        answer: asyncio.Future[StageOutput | Failure] = self._saga.loop.create_future()
        if turn.given is not None:
            answer.set_result(turn.given)
        elif stages.is_stopping():
            answer.set_result(STOPPING)
        else:
            turn.waiter = answer
            stages.begin(turn.name, turn.inputs)
        return answer

    async def _intercepted(self, stages: Stages, turn: _Turn) -> StageOutput | BaseException | None:
        """What stageflow lets pass of what the stage or an interceptor answers."""
        began = datetime.now(UTC)
        answer: StageOutput | Failure | None = None

        async def run_stage() -> StageResult:
            nonlocal answer
            if answer is None:
                # An interceptor that asks for a retry gets here again: retries are the policy's, so the answer stays.
                answer = await self._answer(stages, turn)
            if isinstance(answer, Failure):
                raise answer.exception if isinstance(answer.exception, Exception) else RuntimeError(str(answer))
            return StageResult(turn.name, "completed", began, datetime.now(UTC), answer.data, answer.error)

        try:
            result = await run_with_interceptors(turn.name, run_stage, self._context, self._interceptors)
        finally:
            if isinstance(answer, Failure) and answer.exception is not None:
                begin_with_user(answer.exception)
        if answer is None and result.error is not None:
            # An interceptor refuses the stage, which stageflow takes for an output; or one has set a time limit: the stage itself goes on,
            # and is waited for. What has completed does not run, so there is nothing to refuse.
            return turn.given if turn.given is not None else RuntimeError(result.error)
        if turn.given is None and turn.waiter is None and not stages.can_be_left_out(turn.name):
            # For what an earlier run has had it do nobody else can answer.
            answer = await self._answer(stages, turn)
        if answer is not None:
            return _output_of(answer)
        return StageOutput.ok(_data_of(result))


def _output_of(answer: StageOutput | Failure) -> StageOutput | None:
    """What a stage gives those that depend on it; where it has failed the saga stops."""
    return answer if isinstance(answer, StageOutput) else None


def _data_of(result: StageResult) -> dict[str, Any]:
    """What stageflow takes of what an interceptor answers: a dict, or that of a result."""
    data: Any = result.data
    if isinstance(data, StageResult):
        data = data.data
    return data if isinstance(data, dict) else {}
