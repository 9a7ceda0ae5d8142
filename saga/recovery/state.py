"""What a saga's events mean: pure, without I/O, without user code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, ClassVar, Final

from stageflow.api import StageOutput

from saga.errors import LedgerCorrupt
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    Event,
    FallbackFailed,
    FallbackUsed,
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaStatus,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageEvent,
    StageFailed,
    StageProbed,
    StageSettled,
    StageSkipped,
    StageStarted,
    TurnReason,
    Verdict,
)
from saga.failures import Failure, FailureKind
from saga.graph import Graph, Role
from saga.ledger import TRANSITIONS, StageState
from saga.policies import ContinueWithFallback, FailFast
from saga.quick import members
from saga.recovery.record import StageRecord, begun, ended
from saga.recovery.scope import spared, undo_scope

_S: Final = members(StageState)
_STATUS: Final = members(SagaStatus)
_ROLE: Final = members(Role)
_KIND: Final = members(FailureKind)
_ANSWERS: Final = frozenset({FailureKind.REPORTED, FailureKind.CANCELLED})
"""What a stage says of its own accord when it has had no effect."""
_BEGINNINGS: Final = TRANSITIONS[StageState.NOT_RUN]
_COMPLETIONS: Final = frozenset({StageCompleted, CompensationCompleted})
"""What may come late: when nobody waits for it any more."""
_RUNNING: Final = frozenset({StageState.RUNNING})
_UNDER_WAY: Final = _RUNNING | {StageState.COMPENSATING}


class SagaState:
    """The fold of a saga's events.

    Feed it the events in order; what contradicts the transition table is refused.

    Attributes:
        started: How the saga began.
        graph: Its stages, with what they offer since it was resumed last.
        policy: What happens when something fails: the one it was started with, or resumed with last.
        status: Where it stands.
        ended_at: When it came to rest; None while it has not.
        stop: What is known to have stopped it first, beside the failures of its stages.
        cause: What stopped it first, since it was started or run on, or a failure that outweighs the CANCEL that did; None if nothing did.
        reason: Why it went backward, the last time; None if it never did.
        failures: Every failure of every attempt, in the order of the ledger, each once.
        stages: What the events say of each stage, in topological order.
        is_spotless: It was never resumed, and no stage has failed, come into question, been settled or skipped itself after it recorded an
            effect: nothing is left over.

    Raises:
        LedgerCorrupt: The first event is no `SagaStarted`, or one follows that may not.
    """

    def __init__(self, events: Iterable[AnyEvent]) -> None:
        first, *rest = events
        if not isinstance(first, SagaStarted):
            raise LedgerCorrupt(f"a saga begins with SagaStarted, this one with {type(first).__name__}; nothing was changed")
        self.started: Final = first
        self.graph: Graph = first.graph
        self.policy: FailFast | ContinueWithFallback = first.policy
        self.status = _STATUS.RUNNING
        self.ended_at: datetime | None = None
        self.stop: Failure | None = None
        self.cause: Failure | None = None
        self.reason: TurnReason | None = None
        # Not a list: whether one is among thousands is asked for each of them.
        self.failures: dict[Failure, None] = {}
        self.stages: Final[dict[str, StageRecord]] = {name: StageRecord() for name in self.graph.names}
        self.is_spotless = True
        self._started = 0
        self._undo_started = 0
        # Python looks up anew each time what an object has of its class.
        self._fold = self._FOLD
        for event in rest:
            self.apply(event)

    def apply(self, event: AnyEvent) -> None:
        """Take in the next event."""
        if not isinstance(event, StageEvent):
            self._apply_to_saga(event)
            return
        record = self.stages.get(event.stage)
        if record is None:
            raise self._contradiction("a saga without that stage", event)
        if not self._may_follow(record, event):
            raise self._contradiction(f"stage {event.stage!r} in state {record.state.value}", event)
        self._fold[type(event)](self, record, event)
        if record.held is not None and record.has_late_question:
            # Whatever becomes known of another execution.
            record.doubt = True

    def _apply_to_saga(self, event: AnyEvent) -> None:
        match event:
            case SagaTurnedBack():
                self._turn_back(event)
            case SagaEnded():
                self._end(event)
            case SagaStopped():
                self._stop(event)
            case SagaResumed():
                self._resume(event)
            case _:
                raise self._contradiction("a saga that has started", event)

    def _end(self, event: SagaEnded) -> None:
        self._refuse_beside(_UNDER_WAY, event)
        self.status = event.status
        self.ended_at = event.at
        self._concludes_from(event.cause)

    def _refuse_beside(self, states: frozenset[StageState], event: SagaEnded | SagaTurnedBack) -> None:
        for record in self.stages.values():
            if record.state in states:
                raise self._contradiction("a saga whose stages still run", event)

    def _turn_back(self, event: SagaTurnedBack) -> None:
        # Promise 3: no compensation starts while a stage of the saga is running. One that is under way may be about less than this turn.
        self._refuse_beside(_RUNNING, event)
        self._take_offers(event)
        self.status = _STATUS.COMPENSATING
        self.reason = event.reason
        if self.ended_at is not None:
            self._ask_anew()
        self.ended_at = None
        self._concludes_from(event.cause)

    def _concludes_from(self, cause: Failure | None) -> None:
        """Take what the forward run came to its end by: what stopped it first, or a failure that outweighs the CANCEL that did."""
        if cause is None:
            return
        if self.cause is None or self.cause.kind is _KIND.CANCELLED:
            self.cause = cause
        self._note(cause)

    def _take_offers(self, event: SagaResumed | SagaTurnedBack) -> None:
        if event.graph is None:
            return
        differences = self.graph.differences(event.graph)
        if differences:
            raise self._contradiction(f"a saga with another graph ({'; '.join(differences)})", event)
        self.graph = event.graph

    def _stop(self, event: SagaStopped) -> None:
        self.stop = self.stop or event.cause
        self.cause = self.cause or event.cause
        self._note(event.cause)

    def _resume(self, event: SagaResumed) -> None:
        had_ended = self.ended_at is not None
        if event.forward and self.status is _STATUS.COMPENSATING:
            raise self._contradiction("a saga that is compensating", event)
        if not event.forward and self.reason is None:
            raise self._contradiction("a saga that never turned back", event)
        self._take_offers(event)
        self.is_spotless = False
        self.policy = event.policy or self.policy
        self.ended_at = None
        self._ask_anew()
        if not event.forward:
            self.status = _STATUS.COMPENSATING
            return
        self.status = _STATUS.RUNNING
        if had_ended:
            self.stop = self.cause = self.reason = None
            self._reopen()
            return
        for name, record in self.stages.items():
            # One that failed before its process died may have got a fallback, or its saga a policy that calls it.
            self._note_fallback_due(record, name)

    def _note_fallback_due(self, record: StageRecord, stage: str) -> None:
        """Whether a stage that has failed gets its own fallback next: its probe, if it has one, is asked before."""
        node = self.graph[stage]
        falls_back = isinstance(self.policy, ContinueWithFallback) and node.has_fallback and self.status is _STATUS.RUNNING
        is_asked = not node.can_probe or record.unanswered or record.answer is False
        record.awaits_fallback = record.awaits_fallback or (record.attempts_failed and falls_back and is_asked)

    def _ask_anew(self) -> None:
        """Whoever goes on with a saga that came to rest hopes for the answers that it did not get."""
        for record in self.stages.values():
            if record.doubt:
                record.ask_anew()

    def _reopen(self) -> None:
        """Mark what runs once more: what failed, what was undone, and what was worked out from outputs that are gone."""
        # What can't be undone any more of a stage that a fallback stands in for makes it no more needed, unless the fallback's is among it.
        halves = [(name, record) for name, record in self.stages.items() if record.undone_in_part and not record.fallback_serves]
        in_part = {name for name, record in halves if record.state is not _S.FALLBACK or record.undoes_fallback}
        for name, record in self.stages.items():
            node = self.graph[name]
            is_whole = record.landed and not record.doubt and name not in in_part
            stands = is_whole and node.role is not _ROLE.PLAIN and record.state is not _S.UNDONE
            # One that was to run anew and did not get its turn is still to: what it gave came of outputs that are gone.
            renewed = any(self.stages[below].anew or below in in_part for below in node.dependencies)
            # What stands in for a stage goes on doing so when the remains of that one have been undone.
            lacks_ground = (record.state is _S.UNDONE and not record.fell_back) or record.is_due_anew or renewed
            # Under another key, what it recorded under this one would be nobody's any more.
            left = record.effects or record.stands_in_part or name in in_part
            stands_in_part = bool(record.fallback_ran) or (bool(left) and record.state is not _S.UNDONE)
            record.anew = lacks_ground and not (stands or stands_in_part or record.doubt)
            ended_badly = record.state in {_S.FAILED, _S.CANCELLED, _S.IN_DOUBT, _S.STUCK} or record.with_branch or name in in_part
            # Failing once more, another fallback would stand in, and the sagas of this one would be undone under what stands on them.
            ended_badly = ended_badly and not record.fallback_serves
            record.again = not stands and (record.anew or ended_badly) and record.state is not _S.NOT_RUN
            record.attempts_before = record.attempts
            if name in in_part:
                # What is left of it, running again or undoing it finds out; until it has completed, to run again may come to nothing.
                record.landed, record.undone_in_part, record.stands_in_part, record.state = False, False, True, _S.FAILED
            # Whoever goes forward goes on with it, also with one that came late.
            record.failed = record.failed and (record.fell_back or not stands)
            if stands or record.doubt or record.fallback_serves:
                # It could not be undone; now it need not be, and who goes forward may ask for it again.
                record.unstick()

    def _note(self, failure: Failure) -> None:
        # The cause of a turn is usually a stage's failure that is noted already.
        self.failures[failure] = None

    def first_of(self, failures: Iterable[Failure]) -> Failure | None:
        """Which of some of its failures the ledger has first; None of none."""
        place = {failure: number for number, failure in enumerate(self.failures)}
        return min(failures, key=place.__getitem__, default=None)

    def forget_failures(self) -> None:
        """Let go of the exceptions of a saga that has come to rest; what may still follow on its events is known without them."""
        if not self.failures:
            return  # and every cause is one of them
        self.failures.clear()
        self.stop = self.cause = None
        for record in self.stages.values():
            record.failure = record.undo_failure = None

    def may_follow(self, event: StageEvent) -> bool:
        """Whether the state of its stage lets the event follow."""
        return self._may_follow(self.stages[event.stage], event)

    def _may_follow(self, record: StageRecord, event: StageEvent) -> bool:
        state, kind = record.state, type(event)
        if kind not in TRANSITIONS[state]:
            return False
        # The state allows it; is it one that the saga waits for?
        is_late = kind in _COMPLETIONS and event.late  # type: ignore[attr-defined] # of these two kinds
        if state is _S.NOT_RUN or state is _S.RUNNING or state is _S.COMPENSATING:
            return not is_late
        if kind is StageCompleted:
            return is_late
        if kind is CompensationCompleted:
            return is_late and (state is _S.STUCK or self._is_to_be_undone(event.stage))
        if kind in _BEGINNINGS:
            return record.again
        if kind is StageProbed and state in {_S.KEPT, _S.CANCELLED, _S.UNDONE, _S.STUCK}:
            # Nobody asks a stage that was done with, or is stuck: something has come late, of it or within.
            return event.landed is None  # type: ignore[attr-defined] # of this kind
        if kind is StageSettled:
            return record.is_in_question and self.ended_at is not None
        if kind is CompensationStarted and state is _S.UNDONE:
            return bool(record.fallback_ran)
        return True

    def _is_to_be_undone(self, stage: str) -> bool:
        return self.reason is not None and stage in undo_scope(self, self.reason)

    def _stage_started(self, record: StageRecord, event: StageStarted) -> None:
        if self.status is not _STATUS.RUNNING:
            raise self._contradiction(f"a saga that is {self.status.value}", event)
        if event.execution != record.execution and record.execution:
            record.forget()
        if record.state is not _S.NOT_RUN:
            self._begin_again(record)
        if record.order < 0:
            record.order = self._started
            self._started += 1
        record.state, record.attempts, record.execution = _S.RUNNING, event.attempt, event.execution
        record.tries = begun(record.tries, event.at)

    def _begin_again(self, record: StageRecord) -> None:
        """What was said of the attempts before it, of a stage that has run or was skipped."""
        record.lose_fallback()
        record.ask_anew()
        record.again, record.failed, record.attempts_failed = False, False, False
        record.with_branch, record.skip_reason, record.may_repeat = False, None, False
        record.late_to_undoing, record.undo_was_tried = False, False
        record.let_go()

    def _effect_recorded(self, record: StageRecord, event: EffectRecorded) -> None:
        if record.effects is None:
            record.effects = []
        record.effects.append(event.effect)

    def _stage_completed(self, record: StageRecord, event: StageCompleted) -> None:
        record.not_kept = event.not_kept
        if event.late:
            self._completed_late(record, event)
            return
        record.state, record.landed = _S.KEPT, True
        record.stands_in_part = record.doubt = False
        record.output, record.ended_at = event.output, event.at
        record.tries = ended(record.tries, event.at)

    def _completed_late(self, record: StageRecord, event: StageCompleted) -> None:
        record.late_output, record.late_beside = event.output, record.undo_attempts
        if record.again and record.state is _S.STUCK and self.status is _STATUS.RUNNING:
            # Who goes forward need not undo it.
            record.state = _S.FAILED
        # Run once more it would have its effect twice, and under another key what it has done would be forgotten.
        record.again = False
        match record.state:
            case _S.UNDONE:
                # Which came last, the effect or its compensation, nobody knows.
                record.state, record.doubt, record.late_to_undoing = _S.IN_DOUBT, True, True
                record.undone_too_soon += 1
            case _S.FALLBACK:
                record.landed, record.doubt = True, False
            case _S.IN_DOUBT if record.late_to_undoing:
                # Another attempt of it has come so before.
                pass
            case _S.STUCK:
                record.landed, record.doubt, record.failed = True, False, record.fell_back
            case _:
                # It was to run again, if a fallback stood in: that need not be any more. Where its own ground is undone, it serves nothing.
                record.lose_fallback()
                record.state, record.landed, record.doubt, record.failed = _S.KEPT, True, False, self._has_lost_ground(event.stage)
        if not record.fell_back:
            # What stands in for it is what others have gone on with, and go on with.
            record.output, record.ended_at = event.output, event.at

    def _has_lost_ground(self, stage: str) -> bool:
        below = [self.stages[name] for name in self.graph.with_ancestors([stage]) if name != stage]
        return any(record.state in {_S.UNDONE, _S.COMPENSATING} and (record.undoes_fallback or not record.fell_back) for record in below)

    def _stage_failed(self, record: StageRecord, event: StageFailed) -> None:
        self.is_spotless = False
        record.lose_fallback()
        if record.is_due_anew:
            record.forget()
        # A retry that is called off repeats the failure that it was meant to mend.
        self._note(event.failure)
        record.failure = event.failure
        if record.tries and record.tries[-1].is_open and event.failure.kind is _KIND.INTERRUPTED and not event.in_doubt:
            # Interrupted while its code ran it is in doubt, unless it is plain, and of that nobody asks.
            record.never_ran += 1
        record.tries = ended(record.tries, event.at, event.failure.kind)
        # An attempt that may have landed is not answered for by a later one that did not, unless that one says so and the outside
        # world would have recognised the request. One that raised, or never ran, may not have got through to it.
        is_answer = self.graph[event.stage].idempotent and event.failure.kind in _ANSWERS
        record.doubt = event.in_doubt or (record.doubt and not is_answer)
        record.past_pivot = record.past_pivot or event.past_pivot
        record.note_left(within=event.left_within)
        if event.will_retry:
            return
        record.again = False
        record.failed, record.attempts_failed, record.ended_at, record.output = True, True, event.at, event.output
        self._note_fallback_due(record, event.stage)
        if record.doubt:
            record.state = _S.IN_DOUBT
        elif event.failure.kind is _KIND.CANCELLED:
            record.state = _S.CANCELLED
        else:
            record.state = _S.FAILED

    def _stage_skipped(self, record: StageRecord, event: StageSkipped) -> None:
        record.lose_fallback()
        if record.is_due_anew:
            record.forget()
        if not event.with_branch and not record.may_have_left_something:
            # An earlier run's failure is made good: those that depend on the stage have what it, or somebody for it, gives them.
            record.failed, record.attempts_failed = False, False
        self.is_spotless = self.is_spotless and not record.effects
        record.state, record.output, record.again = _S.SKIPPED, event.output, False
        record.skip_reason, record.with_branch, record.not_kept = event.reason, event.with_branch, event.not_kept
        record.ended_at = event.at if record.tries else None
        record.tries = ended(record.tries, event.at)

    def _fallback_used(self, record: StageRecord, event: FallbackUsed) -> None:
        record.state, record.fell_back, record.again = _S.FALLBACK, True, False
        record.fallback_ran = event.ran
        record.note_left(within=event.left_within)
        record.output, record.ended_at = event.output, event.at

    def _fallback_failed(self, record: StageRecord, event: FallbackFailed) -> None:
        record.fallback_failed = True
        record.note_left(within=event.left_within)
        self._note(event.failure)

    def _stage_probed(self, record: StageRecord, event: StageProbed) -> None:
        if event.failure is not None:
            self._note(event.failure)
            if event.failure.kind is _KIND.COMPENSATION:
                record.undo_failure = event.failure
        if event.will_retry:
            return
        record.note_left(within=event.left_within)
        if record.state is _S.COMPENSATING:
            self._probed_in_its_undoing(record, event)
            return
        if event.landed is None:
            self._comes_into_question(record, event)
            self._note_fallback_due(record, event.stage)
            return
        record.answer, record.doubt = event.landed, False
        self._note_fallback_due(record, event.stage)
        record.let_go()
        if record.state in {_S.FALLBACK, _S.SKIPPED}:
            # What stands in for it was used already: what it gave comes too late.
            record.landed, record.late_output = event.landed, event.output
        elif event.landed and record.fell_back and not record.again:
            # It had come late to the undoing of what it had left before.
            record.state, record.landed, record.late_output = _S.FALLBACK, True, event.output
        elif event.landed:
            record.lose_fallback()
            record.state, record.landed, record.failed, record.again = _S.KEPT, True, False, False
            record.output, record.ended_at = event.output, event.at
        elif record.state is _S.IN_DOUBT:
            # What was thought to have come after its undoing had come before it, or the undoing got through though it seemed to fail:
            # nothing is left to undo, and its key may be used up.
            is_undone = (record.late_to_undoing or record.undo_was_tried) and not event.left_within
            record.state, record.landed, record.anew = (_S.UNDONE if is_undone else _S.FAILED), False, is_undone or record.anew

    def _probed_in_its_undoing(self, record: StageRecord, event: StageProbed) -> None:
        record.undo_in_question = False
        if event.landed is False and not event.left_within:
            record.becomes_undone()
            record.undo_ended_at = event.at
        if not event.landed:
            return
        if record.answer is False:
            # It had come late to the answer before.
            record.answer = True
        if record.doubt:
            # It was begun to be undone in doubt: what goes on with that is told what it gave.
            record.answer, record.landed, record.doubt = True, True, False
            if record.fell_back:
                record.late_output = event.output
            else:
                record.output = event.output

    def _comes_into_question(self, record: StageRecord, event: StageProbed) -> None:
        """Nobody can tell what stands of it, also where it was done with: something has come late, of it or within."""
        self.is_spotless = False
        if event.held and not record.has_late_question:
            record.held = event
        if event.failure is not None and event.failure.kind is _KIND.LATE:
            # What is known of the execution that stands stays so, and the saga goes the way that follows from it.
            return
        record.failure = record.failure or event.failure
        if record.state is not _S.UNDONE:
            # One that was cut off because the saga stopped has not failed: it is asked again.
            failed = event.failure is None or event.failure.kind is not _KIND.INTERRUPTED
            record.answer, record.unanswered, record.doubt = None, failed, True
            if record.state in {_S.FAILED, _S.KEPT, _S.CANCELLED}:
                record.state = _S.IN_DOUBT
            return
        # What has undone it once undoes it again: what it was of the saga below it knows, and how much of that stands.
        record.undone_too_soon += 1
        record.doubt = not (record.landed or record.effects)
        record.undone_in_part, record.state = not record.doubt, _S.STUCK
        record.unstick()

    def _compensation_started(self, record: StageRecord, event: CompensationStarted) -> None:
        if self.status is not _STATUS.COMPENSATING:
            raise self._contradiction(f"a saga that is {self.status.value}", event)
        if record.state is _S.UNDONE:
            # What it had left is undone; this is about the sagas of its fallback, which nothing uses any more.
            record.landed, record.effects, record.late_output = False, None, None
            record.undone_too_soon += 1
            record.undo_order, record.undo_tries = -1, ()
        if record.fallback_ran and self.reason is not None:
            record.undoes_fallback = event.stage not in spared(self, self.reason)
        if record.undo_order < 0:
            record.undo_order = self._undo_started
            self._undo_started += 1
        record.state, record.undo_attempts, record.undo_was_tried = _S.COMPENSATING, event.attempt, True
        record.undo_tries = begun(record.undo_tries, event.at)

    def _compensation_completed(self, record: StageRecord, event: CompensationCompleted) -> None:
        record.becomes_undone()
        record.let_go()
        record.undo_ended_at = event.at
        record.undo_tries = ended(record.undo_tries, event.at)

    def _compensation_failed(self, record: StageRecord, event: CompensationFailed) -> None:
        self._note(event.failure)
        record.undo_failure = event.failure
        record.undo_tries = ended(record.undo_tries, event.at, event.failure.kind)
        record.undo_in_question = event.failure.kind is _KIND.CRASHED
        record.undone_in_part = record.undone_in_part or event.in_part
        if event.past_pivot:
            record.let_go()
            record.past_pivot = True
            self._stays_past_pivot(record, event)
        elif not event.will_retry:
            record.state, record.undo_ended_at = _S.STUCK, event.at

    def _stays_past_pivot(self, record: StageRecord, event: CompensationFailed) -> None:
        """It can't be undone any more, and counts as it did before; but what it has to lose by running again is for a person to say."""
        may_repeat = self.graph[event.stage].idempotent or record.may_repeat
        did_its_part = record.landed or record.fell_back
        is_in_question = record.undone_in_part if did_its_part else record.doubt
        # What one in doubt has done beside what is beyond that point nobody knows, still.
        record.doubt = record.doubt and not (did_its_part or may_repeat)
        if is_in_question and not may_repeat:
            record.state, record.undo_ended_at = _S.STUCK, event.at
        elif did_its_part:
            record.state = _S.FALLBACK if record.fell_back else _S.KEPT
        else:
            # It had failed before that: running again, it finds what is left.
            record.state, record.undone_in_part, record.stands_in_part = _S.FAILED, False, True

    def _stage_settled(self, record: StageRecord, event: StageSettled) -> None:
        self.is_spotless = False
        record.settled = event
        if event.verdict is Verdict.RETRY:
            # Whether it has landed is as unknown as before; going forward, it may run again all the same.
            record.may_repeat = True
            record.ask_anew()
            record.let_go()
            record.unstick()
            return
        record.held, record.undone_in_part, record.doubt = None, False, False
        if event.verdict is Verdict.UNDONE:
            # Also what was beyond a point of no return of its own: it protects nothing any more.
            record.landed, record.past_pivot, record.undo_ended_at = False, False, event.at
            record.becomes_undone()
            return
        if record.fell_back:
            record.state = _S.FALLBACK
        else:
            record.state, record.failed = _S.KEPT, False
            # What it returned beside a failure is no output.
            record.output = event.output or (record.output if record.landed else None) or StageOutput.ok()
        record.landed = True

    _FOLD: ClassVar[dict[type[StageEvent], Callable[[SagaState, StageRecord, Any], None]]] = {
        StageStarted: _stage_started,
        EffectRecorded: _effect_recorded,
        StageCompleted: _stage_completed,
        StageFailed: _stage_failed,
        StageSkipped: _stage_skipped,
        FallbackUsed: _fallback_used,
        FallbackFailed: _fallback_failed,
        StageProbed: _stage_probed,
        CompensationStarted: _compensation_started,
        CompensationCompleted: _compensation_completed,
        CompensationFailed: _compensation_failed,
        StageSettled: _stage_settled,
    }

    def _contradiction(self, found: str, event: Event) -> LedgerCorrupt:
        return LedgerCorrupt(
            f"saga {self.started.saga_id}: {type(event).__name__} can't follow on {found}; the saga is left as it is. "
            "Compare its ledger with a backup before you go on."
        )
