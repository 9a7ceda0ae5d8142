"""The report: what became of every stage, as a projection of the saga's events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import cached_property
from heapq import merge
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo
from stageflow.api import PipelineResults, StageOutput

from saga.errors import LedgerConflict, MisuseError, PipelineInvalid, SagaError, SagaFailed
from saga.events import AnyEvent, SagaStatus, StageSettled, Verdict
from saga.failures import Failure, FailureKind
from saga.graph import Graph, Node
from saga.ledger import StageState
from saga.outputs import Output, Plain, copied, copied_output
from saga.quick import frozen, maker, members, model_maker
from saga.recovery import stage_states, verdicts_on
from saga.recovery.record import StageRecord, Try, since
from saga.recovery.scope import protected
from saga.recovery.state import SagaState
from saga.render.text import summary
from saga.text import printable, shown

_S: Final = members(StageState)


@frozen
class CompensationReport:
    """What became of one stage's compensation.

    Attributes:
        attempts: How many started.
        started_at: When the first one did, UTC.
        ended_at: When the effect was undone, or given up as stuck, UTC; None if neither has happened.
        failure: The last failure of the compensation or of the probe.
        tries: Each attempt: its start, its end and in what way it failed.
    """

    attempts: int
    started_at: datetime | None
    ended_at: datetime | None
    failure: Failure | None
    tries: tuple[Try, ...] = ()


@frozen
class Settlement:
    """What a person said of a stage that was stuck or in doubt.

    Attributes:
        verdict: What they said.
        note: Why.
        by: Who.
        at: When, UTC.
    """

    verdict: Verdict
    note: str
    by: str
    at: datetime

    @classmethod
    def of(cls, event: StageSettled) -> Self:
        """Project the event."""
        return cls(verdict=event.verdict, note=event.note, by=event.by, at=event.at)


@frozen
class StageReport:
    """What became of one stage.

    All but `executions`, `children` and `unread` is of its last execution: a stage that runs again with another key begins anew.

    Attributes:
        state: Where it stands.
        output: What it gave: its output, its fallback's, or what it returned beside a failure or a skip.
        failure: The last failure of its execution, also when a later attempt succeeded.
        failed: Whether its execution failed for good, whatever a probe or a person said after that.
        attempts: How often its execution was started.
        started_at: When the first attempt started, UTC.
        ended_at: When the last one ended, UTC.
        effects: What it recorded with `ctx.record`, oldest first.
        fallback: Whether its output is its fallback's.
        skip_reason: Why it was skipped, if it was.
        late_output: What it gave when it had been given up and nobody waited for it any more.
        executions: How often it was executed; one more each time that it ran again after it, or something that it depends on, was undone.
        settled: What a person said of it last.
        children: The sagas that this execution and those before it ran, oldest first; those of them that the ledger can read.
        unread: By id the other ones, and what the ledger says of each: nobody knows what of them stands.
        probed: What its probe answered: whether its effect had landed; None if it gave no answer.
        compensation: What became of its compensation; None if neither it nor a probe was tried.
        dependencies: The stages that it waits for.
        tries: Each attempt: its start, its end and in what way it failed.
        verdicts: What a person may say of it; empty where nobody's word is asked for, or while what it has run has not come to rest.
    """

    state: StageState
    output: Output | None = None
    failure: Failure | None = None
    failed: bool = False
    attempts: int = 0
    started_at: datetime | None = None
    ended_at: datetime | None = None
    effects: tuple[Plain, ...] = ()
    fallback: bool = False
    skip_reason: str | None = None
    late_output: Output | None = None
    executions: int = 0
    settled: Settlement | None = None
    children: tuple[SagaReport, ...] = ()
    unread: dict[str, str] = field(default_factory=dict)
    probed: bool | None = None
    compensation: CompensationReport | None = None
    dependencies: tuple[str, ...] = ()
    tries: tuple[Try, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def __repr__(self) -> str:
        """Show it as any dataclass, with a stand-in for outputs and effects whose own words fail."""
        return f"{type(self).__qualname__}({', '.join(f'{each.name}={shown(getattr(self, each.name))}' for each in fields(self))})"

    @property
    def children_by_path(self) -> dict[str, SagaReport]:
        """Its children, by what the paths to their stages begin with.

        An only child's begin with the stage's name. Of several each has its own, as its id has, so that no path ever leads to another one.
        """
        if len(self.children) == 1 and not self.unread:
            return {str(self.children[0].parent_stage): self.children[0]}
        # The child's id begins with its parent's.
        return {child.saga_id.removeprefix(f"{child.parent}/"): child for child in self.children}

    @property
    def is_kept_by_word(self) -> bool:
        """Whether it stands because a person said that it is to."""
        return self.settled is not None and self.settled.verdict is Verdict.KEPT and self.state in {_S.KEPT, _S.FALLBACK}

    @property
    def is_undone_by_word(self) -> bool:
        """Whether a person said that nothing of it stands; its fallback may stand in all the same."""
        return self.settled is not None and self.settled.verdict is Verdict.UNDONE and self.state in {_S.UNDONE, _S.FALLBACK}

    @property
    def is_known_by_word(self) -> bool:
        """Whether a person said what of it stands: all that is to, or nothing."""
        return self.is_undone_by_word or self.is_kept_by_word

    @classmethod
    def of(
        cls,
        record: StageRecord,
        state: StageState,
        dependencies: tuple[str, ...],
        children: tuple[SagaReport, ...] = (),
        unread: Mapping[str, str] | None = None,
        verdicts: tuple[Verdict, ...] = (),
    ) -> Self:
        """Project what the events say of one stage."""
        if record.state is _S.NOT_RUN:
            return cls(state=state, dependencies=dependencies)
        undo = None
        if record.undo_attempts or record.undo_failure is not None:
            undo = _compensation_report(
                attempts=record.undo_attempts,
                started_at=since(record.undo_tries),
                ended_at=record.undo_ended_at,
                failure=record.undo_failure,
                tries=record.undo_tries,
            )
        make = cast("type[Self]", _stage_report) if cls is StageReport else cls
        # Python packs more than fifteen names into a dict, and takes them out again.
        made = make(
            state=state,
            output=None if record.output is None else copied_output(record.output),
            failure=record.failure,
            failed=record.attempts_failed,
            attempts=record.attempts,
            started_at=since(record.tries),
            ended_at=record.ended_at,
            effects=tuple(map(copied, record.effects)) if record.effects else (),
            fallback=record.fell_back,
            skip_reason=record.skip_reason,
            executions=record.execution,
            probed=record.answer,
            compensation=undo,
            dependencies=dependencies,
            tries=record.tries,
        )
        late_output = record.late_output or (None if record.held is None else record.held.output)
        if late_output is None and not (record.settled or children or unread or verdicts):
            return made  # as nearly always
        return replace(
            made,
            late_output=None if late_output is None else copied_output(late_output),
            settled=None if record.settled is None else Settlement.of(record.settled),
            children=children,
            unread=dict(unread) if unread else {},
            verdicts=tuple([verdict for verdict in verdicts if _may_be_said(verdict, children)]),
        )


_compensation_report: Final = maker(CompensationReport)
_stage_report: Final = maker(StageReport)


def _may_be_said(verdict: Verdict, within: tuple[SagaReport, ...]) -> bool:
    """Whether it is for a person to say so of a stage: what stands of it is not as long as it is still being found out within."""
    if verdict is Verdict.RETRY:
        return True
    return not any(map(_is_alive, within)) and (verdict is Verdict.KEPT or all(child.clean for child in within))


def _is_alive(report: SagaReport) -> bool:
    """Whether a saga, or one within it, has not come to rest."""
    return report.ended_at is None or any(_is_alive(child) for stage in report.stages.values() for child in stage.children)


def _in_order(stages: dict[str, StageReport]) -> dict[str, StageReport]:
    """The stages in topological order, which what keeps a report's JSON may have changed: a jsonb of PostgreSQL's sorts keys."""
    before: set[str] = set()
    for name, stage in stages.items():
        if not before.issuperset(stage.dependencies):
            return _sorted_again(stages)
        before.add(name)
    return stages


def _sorted_again(stages: dict[str, StageReport]) -> dict[str, StageReport]:
    try:
        graph = Graph.of(Node(name=name, dependencies=stage.dependencies) for name, stage in stages.items())
    except PipelineInvalid as invalid:
        raise ValueError(str(invalid)) from None
    return {name: stages[name] for name in graph.names}


def _of_stages(names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    stages = info.data.get("stages", names)  # missing where they are refused themselves
    for name in names:
        if name not in stages:
            raise ValueError(f"expected stages of the report, got {name!r}")
    return names


class SagaReport(BaseModel):
    """What became of a saga. Reads and writes JSON: `model_dump_json()`, `model_validate_json(text)`.

    Attributes:
        saga_id: Its id.
        pipeline: The pipeline's name.
        status: Where the saga stands.
        cause: What stopped it first, or a failure that outweighs the CANCEL that did; None if nothing did.
        failures: Every failure of every attempt, forward and backward, oldest first.
        started_at: When it started, UTC.
        ended_at: When it came to rest, UTC; None while it has not.
        stages: Every stage of the pipeline, in topological order.
        compensation_order: The stages whose compensations started, in the order in which they did; without those that have run anew since.
        past_pivot: Whether something of it can't be undone any more: a pivot has completed, or a person said that it is to be kept.
        parent: The id of the saga that runs it as a child, if one does.
        parent_stage: The parent's stage that does.
    """

    model_config = ConfigDict(frozen=True)

    saga_id: str
    pipeline: str
    status: SagaStatus
    cause: Failure | None = None
    failures: tuple[Failure, ...] = ()
    started_at: datetime
    ended_at: datetime | None = None
    stages: Annotated[dict[str, StageReport], AfterValidator(_in_order)]
    compensation_order: Annotated[tuple[str, ...], AfterValidator(_of_stages)] = ()
    past_pivot: bool = False
    parent: str | None = None
    parent_stage: str | None = None

    @classmethod
    def of(
        cls,
        state: SagaState,
        children: Mapping[str, tuple[SagaReport, ...]] | None = None,
        exceptions: Mapping[Failure, BaseException] | None = None,
        unread: Mapping[str, Mapping[str, str]] | None = None,
        *,
        is_turned_back: bool = False,
    ) -> Self:
        """Project a saga's state and the reports of the sagas that its stages ran, with their exceptions, which no ledger keeps.

        Those that can't be read are left out of it, and told by stage and by id, with what the ledger says. A saga that has not turned back
        may be below one that has, and goes forward no more.
        """
        children, unread = children or {}, unread or {}
        undone = sorted([(record.undo_order, name) for name, record in state.stages.items() if record.undo_order >= 0])
        shown = stage_states(state)
        stages = {}
        for node in state.graph.nodes:
            name, where = node.name, shown[node.name]
            # Of other stages nobody's word is asked for.
            is_asked = where is _S.STUCK or where is _S.IN_DOUBT
            verdicts = verdicts_on(state, name, is_turned_back=is_turned_back) if is_asked else ()
            stages[name] = StageReport.of(state.stages[name], where, node.dependencies, children.get(name, ()), unread.get(name), verdicts)
        make = cast("type[Self]", _saga_report) if cls is SagaReport else cls
        return make(
            saga_id=state.started.saga_id,
            pipeline=state.started.pipeline,
            status=state.status,
            cause=state.cause,
            failures=_oldest_first(state, _of_children(stages.values(), exceptions or {}) if children else ()),
            started_at=state.started.at,
            ended_at=state.ended_at,
            stages=stages,
            compensation_order=tuple([name for _, name in undone]),
            past_pivot=bool(protected(state)),
            parent=state.started.parent,
            parent_stage=state.started.parent_stage,
        )

    @classmethod
    def from_events(cls, events: Iterable[AnyEvent]) -> Self:
        """Project a saga's events.

        Raises:
            LedgerCorrupt: The events contradict the transition table.
        """
        return cls.of(SagaState(events))

    def _outputs(self, *states: StageState) -> dict[str, StageOutput | None]:
        return {name: stage.output for name, stage in self.stages.items() if stage.state in states}

    def _with_children(self, state: StageState) -> dict[str, StageOutput | None]:
        found: dict[str, StageOutput | None] = {}
        for name, stage in self.stages.items():
            if stage.state is state:
                found[name] = stage.output
            # What a person keeps is kept with all that is within it.
            within = {} if stage.is_kept_by_word else stage.children_by_path
            for path, child in within.items():
                found |= {f"{path}/{inner}": output for inner, output in child._with_children(state).items()}  # noqa: SLF001 - of its own kind
        return found

    def _names(self, state: StageState) -> tuple[str, ...]:
        return tuple(name for name, stage in self.stages.items() if stage.state is state)

    @property
    def kept(self) -> dict[str, StageOutput]:
        """The outputs that stand, of stages that completed and of fallbacks, in topological order."""
        return {name: output for name, output in self._outputs(_S.KEPT, _S.FALLBACK).items() if output is not None}

    @property
    def undone(self) -> dict[str, StageOutput | None]:
        """The outputs of stages whose effect was compensated; None for one that never completed."""
        return self._outputs(_S.UNDONE)

    @property
    def stuck(self) -> dict[str, StageOutput | None]:
        """The outputs of stages whose compensation failed for good: their effect stands.

        A stage of a nested saga is named by its path, here and below: `book_hotel/charge_deposit`. Where a stage has run several sagas, the
        path begins as the saga's own id does: `book_hotel#1.2/charge_deposit`.
        """
        return self._with_children(_S.STUCK)

    @property
    def blocked(self) -> dict[str, StageOutput | None]:
        """The outputs of stages that are still in effect because something that depends on them is stuck or in doubt."""
        return self._with_children(_S.BLOCKED)

    @property
    def in_doubt(self) -> dict[str, StageOutput | None]:
        """The stages of which nobody knows whether their effect landed, with what they returned, if anything."""
        return self._with_children(_S.IN_DOUBT)

    @property
    def unread(self) -> dict[str, str]:
        """The sagas within that the ledger can't read, by id, with what it says: nobody knows what of them stands."""
        found: dict[str, str] = {}
        for stage in self.stages.values():
            if not stage.is_known_by_word:
                found |= stage.unread
                for child in stage.children:
                    found |= child.unread
        return found

    @property
    def failed(self) -> tuple[str, ...]:
        """The stages whose execution failed for good, also where recorded effects were undone or a fallback stands in."""
        return tuple(name for name, stage in self.stages.items() if stage.failed and stage.state not in {_S.KEPT, _S.CANCELLED})

    @property
    def skipped(self) -> tuple[str, ...]:
        """The stages that were skipped."""
        return self._names(_S.SKIPPED)

    @property
    def not_run(self) -> tuple[str, ...]:
        """The stages that never started."""
        return self._names(_S.NOT_RUN)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The stages whose fallback stands in."""
        return tuple(name for name, stage in self.stages.items() if stage.fallback)

    @property
    def ok(self) -> bool:
        """Whether the saga came to its end going forward: completed, or degraded."""
        return self.status in {SagaStatus.COMPLETED, SagaStatus.DEGRADED}

    @property
    def clean(self) -> bool:
        """Whether nothing is stuck, blocked or in doubt, and every saga within can be read."""
        return not (self.stuck or self.blocked or self.in_doubt or self.unread)

    def failures_of(self, stage: str) -> Sequence[Failure]:
        """Those of its failures that are told under this name, oldest first; a stage of a nested saga is named by its path."""
        return self._failures_by_stage.get(stage, ())

    @cached_property
    def _failures_by_stage(self) -> Mapping[str | None, Sequence[Failure]]:
        # Whoever puts a report into words asks for each stage, and everything may have failed at once.
        found: dict[str | None, list[Failure]] = {}
        for failure in self.failures:
            found.setdefault(failure.stage, []).append(failure)
        return found

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy it, with some fields replaced."""
        copied = super().model_copy(update=update, deep=deep)
        # It may have other failures, and what pydantic copies of a cached property depends on its version, and on `deep`.
        copied.__dict__.pop("_failures_by_stage", None)
        return copied

    def raise_for_status(self) -> None:
        """Raise unless the saga came to its end going forward.

        Raises:
            SagaFailed: A group of the stages' own exceptions, the cause first, without what is in another one of them, itself a group;
                its `report` is this report.
        """
        if self.ok:
            return
        failures = list(self.failures)
        if self.cause is not None:
            failures = [self.cause, *(failure for failure in failures if failure != self.cause)]
        errors = [_as_error(failure) for failure in failures] or [SagaError("it was undone on demand")]
        # What a saga within raised as such a group has its errors in it: told twice at each level, they would soon be thousands.
        told = {id(part) for error in errors for part in _parts(error)}
        errors = [error for error in errors if id(error) not in told]
        failed = SagaFailed(f"saga {self.saga_id} ({self.pipeline}) is {self.status.value}", errors)
        failed.report = self
        raise failed

    def to_pipeline_results(self) -> PipelineResults:
        """The saga's outputs as what stageflow's own `Pipeline.run` gives.

        They are the outputs that stand, of stages that completed, fell back or were skipped, and a FAIL or a CANCEL for every stage that
        ended so. What was undone, or still stands though it should not, is not in it: it is nothing to go on with.
        """
        results = PipelineResults()
        for name, stage in self.stages.items():
            if stage.state in {_S.KEPT, _S.FALLBACK, _S.SKIPPED} and stage.output is not None:
                results[name] = stage.output
            elif stage.state is _S.CANCELLED and stage.failure is not None:
                results[name] = _own(stage, StageOutput.cancel(stage.failure.message))
            elif name in self.failed and stage.failure is not None:
                results[name] = _own(stage, StageOutput.fail(stage.failure.message))
        return results

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Show in a line which one it is, and how many of its stages stand where: asyncio.run, too, asks for that of what it returns."""
        yield from (("saga_id", self.saga_id), ("pipeline", self.pipeline), ("status", self.status))
        yield "stages", dict(Counter(stage.state.value for stage in self.stages.values()))

    def __str__(self) -> str:
        """A summary for a terminal."""
        return summary(self)

    def to_svg(self, view: Literal["graph", "timeline"] = "graph") -> str:
        """A picture that needs nothing but itself, for light and for dark surroundings.

        Args:
            view: `graph`: the stages in layers, with forward and backward arrows; `timeline`: a bar for each attempt.

        Raises:
            MisuseError: There is no such view.
        """
        from saga.render.drawing import drawing  # noqa: PLC0415 - only who looks at pictures waits for it
        from saga.render.graph import graph_svg  # noqa: PLC0415 - only who looks at pictures waits for it
        from saga.render.timeline import timeline_svg  # noqa: PLC0415 - only who looks at pictures waits for it

        match view:
            case "graph":
                return graph_svg(drawing(self))
            case "timeline":
                return timeline_svg(self)
        raise MisuseError("view to be 'graph' or 'timeline'", got=repr(view))

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flowchart, without the backward arrows where all would be more than Mermaid draws (500)."""
        from saga.render.drawing import drawing  # noqa: PLC0415 - only who looks at pictures waits for it
        from saga.render.mermaid import graph_mermaid  # noqa: PLC0415 - only who looks at pictures waits for it

        return graph_mermaid(drawing(self))

    def to_html(self) -> str:
        """One file with both pictures, the table, and each stage's attempts, failures, effects and output; it needs nothing else."""
        from saga.render.html import page  # noqa: PLC0415 - only who looks at pictures waits for it

        return page(self)

    def _repr_html_(self) -> str:
        """The graph, in a notebook."""
        from saga.render.html import fragment  # noqa: PLC0415 - only who looks at pictures waits for it

        return fragment(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """What a notebook may choose from."""
        return {"text/plain": str(self), "image/svg+xml": self.to_svg(), "text/html": self._repr_html_()}


_saga_report: Final = model_maker(SagaReport)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What became of the sagas whose processes were thought to be gone.

    Attributes:
        reports: By id, of those that went on, here or meanwhile elsewhere.
        held: By id, of those that somebody alive holds after all.
        failed: By id, of those that could not go on, and why.
    """

    reports: dict[str, SagaReport] = field(default_factory=dict)
    held: dict[str, LedgerConflict] = field(default_factory=dict)
    failed: dict[str, SagaError] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for every saga."""
        lines = [f"{saga_id}: {report.status.value.upper()}" for saga_id, report in self.reports.items()]
        lines += [f"{saga_id}: left alone, {error}" for saga_id, error in self.held.items()]
        lines += [f"{saga_id}: not recovered, {error}" for saga_id, error in self.failed.items()]
        return "\n".join(map(printable, lines)) or "No saga has lost its process."


def _as_error(failure: Failure) -> Exception:
    """The stage's own exception, with its own traceback and notes; else one that says the same."""
    if isinstance(failure.exception, Exception):
        return failure.exception
    error = SagaError(str(failure))
    # None in a report that was read from JSON; in its own process, a CancelledError, which no ExceptionGroup takes.
    error.__cause__ = failure.exception
    if failure.traceback is not None:
        error.add_note(failure.traceback.rstrip())
    return error


def _parts(error: BaseException) -> Iterator[BaseException]:
    """What is in a group of exceptions, and in the groups in it."""
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield part
        yield from _parts(part)


def _oldest_first(state: SagaState, within: Sequence[Sequence[Failure]]) -> tuple[Failure, ...]:
    """The failures of a saga and of those that its stages ran, each saga's as its ledger has them: a clock may be set back."""
    failures = list(state.failures)
    if state.stop is not None and state.stop in failures:
        # What has stopped it may be in the ledger behind the stages that were interrupted for that.
        place = failures.index(state.stop)
        while place and failures[place - 1].kind is FailureKind.INTERRUPTED and failures[place - 1].at > state.stop.at:
            place -= 1
        failures.remove(state.stop)
        failures.insert(place, state.stop)
    return tuple(merge(failures, *within, key=lambda failure: failure.at) if within else failures)


def _of_children(stages: Iterable[StageReport], exceptions: Mapping[Failure, BaseException]) -> list[list[Failure]]:
    """The failures of each child saga, their stages named by their paths."""
    return [
        [
            failure.model_copy(
                update={"stage": path if failure.stage is None else f"{path}/{failure.stage}", "exception": exceptions.get(failure)}
            )
            for failure in report.failures
        ]
        for stage in stages
        if stage.children
        for path, report in stage.children_by_path.items()
    ]


def _own(stage: StageReport, made: StageOutput) -> StageOutput:
    """What a stage gave itself when it ended so, with its data; else what is made of its failure."""
    return stage.output if stage.output is not None and stage.output.status is made.status else made


class NestedSagaFailed(SagaError):
    """The child saga of a stage did not complete, or could not be undone.

    Attributes:
        report: The child's report.
        past_pivot: It failed after its point of no return.
    """

    def __init__(self, report: SagaReport) -> None:
        self.report = report
        self.past_pivot = report.past_pivot
        super().__init__(f"its saga {report.saga_id} is {report.status.value}{_why(report)}")

    @classmethod
    def unless_undone(cls, report: SagaReport) -> Self | None:
        """The error of a child that was to be undone, if something of it stands."""
        if report.clean and not report.past_pivot:
            return None
        failed = cls(report)
        # While anything is stuck or in doubt within, a person has to act, whatever else can't be undone any more.
        failed.past_pivot = report.past_pivot and report.clean
        return failed


def _why(report: SagaReport) -> str:
    """What is in the way of a child: what could not be undone, else what came late, what stopped it or all its branches, what keeps it."""
    stuck = [failure for failure in report.failures if failure.kind is FailureKind.COMPENSATION and failure.stage in report.stuck]
    stuck = stuck or [failure for failure in report.failures if failure.kind is FailureKind.LATE and failure.stage in report.in_doubt]
    fallen = (report.stages[name].failure for name in report.failed if name not in report.fallbacks)
    kept = "a pivot or a person keeps what stands of it" if report.past_pivot else None
    said = stuck[-1] if stuck else report.cause or next(fallen, kept)
    return f": {said}" if said is not None else ""
