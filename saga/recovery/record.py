"""What a saga's events say of one of its stages, and what undoing that stage comes to next: pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from stageflow.api import StageOutput

from saga.events import StageProbed, StageSettled, Verdict
from saga.failures import Failure, FailureKind
from saga.graph import Node, Role
from saga.ledger import StageState
from saga.quick import members

_S: Final = members(StageState)
_KIND: Final = members(FailureKind)
_ROLE: Final = members(Role)


class Try(NamedTuple):
    """One attempt.

    Attributes:
        started_at: When it started, UTC.
        ended_at: When its outcome was recorded, UTC; None if it still runs, or its process was lost.
        failed: In what way it failed; None if it did not, or still runs.
    """

    started_at: datetime
    ended_at: datetime | None = None
    failed: FailureKind | None = None

    @property
    def is_open(self) -> bool:
        """Nothing is recorded of what it came to."""
        return self.ended_at is None and self.failed is None


_new: Final = tuple.__new__
"""The constructor of a named tuple is Python code that calls this."""


def begun(tries: tuple[Try, ...], at: datetime) -> tuple[Try, ...]:
    """The attempts, with one more that has started."""
    return tries + (_new(Try, (at, None, None)),)  # noqa: RUF005 - a list made a tuple takes twice as long


def since(tries: tuple[Try, ...]) -> datetime | None:
    """When the first of some attempts started, UTC; None if there was none."""
    return tries[0][0] if tries else None


def ended(tries: tuple[Try, ...], at: datetime, failed: FailureKind | None = None) -> tuple[Try, ...]:
    """The attempts, with the last one ended; one that has ended, or was never started, is left alone."""
    if not tries:
        return tries
    started_at, ended_at, was_failed = tries[-1]
    if ended_at is not None or was_failed is not None:
        return tries
    # When a process was lost, nobody knows; it is noticed when the saga is resumed, which may be a week later.
    return tries[:-1] + (_new(Try, (started_at, None if failed is _KIND.CRASHED else at, failed)),)  # noqa: RUF005 - as above


@dataclass(slots=True, eq=False)
class StageRecord:
    """What the events say of one stage.

    Attributes:
        state: Where it stands; never BLOCKED, which is read off the other stages.
        attempts: Attempts of this execution that started.
        never_ran: How many of them were stopped before their code ran.
        execution: How often it was executed; one more each time that it ran again after it, or what it depends on, was undone.
        again: The saga was resumed, and the stage is to run once more.
        anew: With `again`: as a new execution.
        attempts_before: How many attempts of this execution had started when the saga was resumed.
        order: Its place in the order in which stages first started; -1 if it never did.
        output: What it gave: when it completed, else its fallback's, else what it returned beside a failure or a skip.
        landed: Its effect is known to have landed.
        doubt: It may have landed, and nobody knows.
        answer: What its probe answered, whether it had landed; None while there is no answer.
        unanswered: A probe has failed for good.
        effects: What it recorded, oldest first; None: nothing.
        failure: Its last failure forward.
        failed: Its execution failed for good, and no probe found its effect; also when that was undone later.
        attempts_failed: Its attempts failed for good, whatever a probe found after that.
        fell_back: Its fallback stands in.
        awaits_fallback: Its execution has failed, and its own fallback was next, its probe asked: whether that has begun no event says.
        fallback_failed: Its own fallback failed.
        fallback_ran: The sagas that its fallback has run, as long as that stands in.
        undoes_fallback: Its compensation, as last attempted, is also about those, which nothing used any more.
        with_branch: It was skipped because something that it depends on failed.
        past_pivot: It has gone beyond a point of no return of its own, though it did not complete.
        not_kept: What of its output the ledger could not keep, and why: nothing can go on from that.
        late_output: What it gave when nobody waited for it any more.
        settled: What a person said of it last.
        held: What came late, of it or in a saga that it ran, and waits for a person's word; None if nothing does.
        may_repeat: Though it is in doubt: a person said so.
        undo_in_question: A process died while it was being compensated.
        undone_in_part: Its compensation has failed, and a part of it may be undone.
        stands_in_part: It is not known to have landed as a whole, and something of it stands.
        undone_too_soon: How often something of it turned out to stand when it had been undone.
        late_to_undoing: It completed late, when it had been undone, and has not run since.
        late_beside: How many attempts of its compensation had started when it last completed late: which came last, nobody knows.
        undo_was_tried: Its compensation has been attempted since it ran last.
        undo_attempts: Compensation attempts that started.
        undo_order: Its place in the order in which compensations first started; -1 if none did.
        undo_failure: The last failure of its compensation or probe.
        tries: Its forward attempts, oldest first.
        undo_tries: Its compensation's attempts, oldest first.
    """

    state: StageState = _S.NOT_RUN
    attempts: int = 0
    never_ran: int = 0
    execution: int = 0
    again: bool = False
    anew: bool = False
    attempts_before: int = 0
    order: int = -1
    ended_at: datetime | None = None
    output: StageOutput | None = None
    landed: bool = False
    doubt: bool = False
    answer: bool | None = None
    unanswered: bool = False
    effects: list[Any] | None = None
    failure: Failure | None = None
    failed: bool = False
    attempts_failed: bool = False
    fell_back: bool = False
    awaits_fallback: bool = False
    fallback_failed: bool = False
    fallback_ran: tuple[str, ...] = ()
    undoes_fallback: bool = False
    with_branch: bool = False
    past_pivot: bool = False
    not_kept: str | None = None
    late_output: StageOutput | None = None
    settled: StageSettled | None = None
    held: StageProbed | None = None
    may_repeat: bool = False
    undo_in_question: bool = False
    undone_in_part: bool = False
    stands_in_part: bool = False
    skip_reason: str | None = None
    undone_too_soon: int = 0
    late_to_undoing: bool = False
    late_beside: int = 0
    undo_was_tried: bool = False
    undo_attempts: int = 0
    undo_order: int = -1
    undo_ended_at: datetime | None = None
    undo_failure: Failure | None = None
    tries: tuple[Try, ...] = ()
    undo_tries: tuple[Try, ...] = ()

    @property
    def started_at(self) -> datetime | None:
        """When its first attempt started, UTC; None if none did."""
        return since(self.tries)

    @property
    def undo_started_at(self) -> datetime | None:
        """When its compensation was first attempted, UTC; None if it was not."""
        return since(self.undo_tries)

    @property
    def is_under_way(self) -> bool:
        """It runs, or is being undone, also between two attempts."""
        return self.state is _S.RUNNING or self.state is _S.COMPENSATING

    @property
    def is_in_question(self) -> bool:
        """A person's word on it is asked for, once its saga has come to rest."""
        return self.state is _S.STUCK or (self.doubt and not self.is_under_way)

    @property
    def has_late_question(self) -> bool:
        """What came late and waits is of its own code: to ask, undo or run it may be about another execution, and tells nothing of that."""
        return self.held is not None and self.held.failure is not None and self.held.failure.kind is FailureKind.LATE

    @property
    def is_kept_by_word(self) -> bool:
        """A person said last that its effect is to stay."""
        return self.settled is not None and self.settled.verdict is Verdict.KEPT

    @property
    def fallback_serves(self) -> bool:
        """Its fallback has run sagas, and nothing has begun to undo these: what used the fallback may stand on them."""
        return bool(self.fallback_ran) and not self.undoes_fallback

    @property
    def is_due_anew(self) -> bool:
        """The saga was resumed, and the stage is still to run in a new execution."""
        return self.again and self.anew

    @property
    def may_have_left_something(self) -> bool:
        """It is not known to have landed as a whole, and something of it stands, or may stand."""
        return self.doubt or bool(self.effects) or self.stands_in_part

    @property
    def attempts_since(self) -> int:
        """How many attempts of this execution have started since the saga was resumed, or began."""
        return self.attempts - self.attempts_before

    @property
    def is_first_since_resumed(self) -> bool:
        """Its attempt is the first one since the saga was resumed, beside such as died with their processes; else its very first."""
        before = self.tries[self.attempts_before : -1]
        return not before or (self.attempts_before > 0 and all(attempt.failed is FailureKind.CRASHED for attempt in before))

    def next_attempt(self) -> tuple[int, int]:
        """The number of the attempt that starts next, and its execution.

        An execution that was undone, or replaced before it began, is never gone on with.
        """
        if self.again and self.anew:
            return 1, (self.execution or 1) + 1
        is_over = self.execution > 0 and not self.attempts
        return self.attempts + 1, (self.execution or 1) + is_over

    def ask_anew(self) -> None:
        """What its probe answered, or did not, holds no more."""
        self.answer, self.unanswered = None, False

    def note_left(self, *, within: bool | None) -> None:
        """Whether sagas that it ran have left something standing; None: as before."""
        if within is not None:
            self.stands_in_part = within

    def lose_fallback(self) -> None:
        """What stood in for it, or was to and failed, does so no more: it runs once more, or was kept from it."""
        self.awaits_fallback, self.fell_back, self.fallback_failed, self.fallback_ran, self.undoes_fallback = False, False, False, (), False

    def becomes_undone(self) -> None:
        """Nothing of it stands, but for the sagas of its fallback, unless these were undone with it."""
        self.state, self.doubt, self.undone_in_part = _S.UNDONE, False, False
        if self.undoes_fallback:
            self.lose_fallback()

    def let_go(self) -> None:
        """What came late within waits no more for a person: the stage has found out itself."""
        if self.held is not None and not self.has_late_question:
            self.held = None

    def unstick(self) -> None:
        """It is stuck no more, if it was; what is left of it may be undone, or it runs once more."""
        if self.state is not _S.STUCK:
            return
        if self.fell_back and not self.again:
            self.state = _S.FALLBACK
        else:
            # One that had landed may have come into question since: it is asked again.
            self.state = _S.IN_DOUBT if self.doubt else _S.KEPT if self.landed else _S.FAILED

    def forget(self) -> None:
        """Nothing of the execution that is over stands, also where another one does not begin; its number is not given again."""
        StageRecord.__init__(self, execution=self.execution, held=self.held if self.has_late_question else None)


class Step(Enum):
    """What undoing a stage comes to next."""

    CLEAR = auto()
    """Nothing of it stands."""
    PROBE = auto()
    """Ask the outside world whether its effect landed."""
    COMPENSATE = auto()
    HOLD = auto()
    """Something stands, or may stand, and nothing can be done about it."""


_STEP: Final = members(Step)


def undo_step(node: Node, record: StageRecord, *, spares: bool = False) -> Step:
    """What undoing this stage comes to next.

    Args:
        node: The stage.
        record: Where it stands.
        spares: Whether the sagas of its fallback are to stay: only what it has left itself is undone.
    """
    if node.role is _ROLE.PLAIN:
        return _STEP.CLEAR
    state = record.state
    if state is _S.COMPENSATING:
        if record.undo_in_question and node.can_probe:
            return _STEP.PROBE
        # Its process may have died in its midst, and what goes on with it copes with doubt no more.
        return _STEP.HOLD if record.doubt and not node.undo_in_doubt else _STEP.COMPENSATE
    if state is _S.STUCK or (record.held is not None and record.has_late_question):
        return _STEP.HOLD
    fallback_stands = record.fallback_ran and not spares
    if state is _S.UNDONE and not fallback_stands:
        return _STEP.CLEAR
    may_ask = node.can_probe and record.answer is None and not record.unanswered
    if may_ask and (record.doubt or (state is _S.FAILED and record.attempts > record.never_ran)):
        return _STEP.PROBE
    if record.past_pivot:
        # Its compensation undoes what may be, where it is made for not knowing; from there on nothing can be done about it.
        return _STEP.COMPENSATE if record.doubt and node.undo_in_doubt else _STEP.HOLD
    if node.role is _ROLE.PIVOT:
        return _STEP.HOLD if record.doubt or record.landed else _STEP.CLEAR
    if node.holds_pivot and record.landed and not record.fell_back:
        # It completed, though it was not known when the saga turned back (promise 10).
        return _STEP.HOLD
    if record.doubt:
        return _STEP.COMPENSATE if node.undo_in_doubt else _STEP.HOLD
    return _STEP.COMPENSATE if record.landed or record.effects or record.stands_in_part or fallback_stands else _STEP.CLEAR
