"""The kit with which users fail their own sagas everywhere: it finds what is wrong, and finds nothing where nothing is."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel
from stageflow.api import Pipeline, StageContext, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    Ledger,
    MisuseError,
    Policy,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaStatus,
    compensable,
    nested,
)
from saga.ledgers.sqlite import SQLiteLedger
from saga.testing import Fault, Trial, Verification, VerificationFailed, verify
from saga.testing.rehearsal import MortalLedger
from saga.testing.verification import _went_on_badly
from tests.controlled import ControlledLoop, elapse, run
from tests.town import Boasting, Booking, Eager, Forgetful, Literal, Lying, Recording, Sale, Silent, Town, Unasked, WithFallback

STUCK, COMPENSATED, COMPLETED, HALTED = SagaStatus.STUCK, SagaStatus.COMPENSATED, SagaStatus.COMPLETED, SagaStatus.HALTED
IN_ONE_ATTEMPT = FailFast(compensation=Compensation(retry=Retry(attempts=1)))


Kind = Callable[[Town, str], Any]


def trip(seat: Kind = Booking, room: Kind = Booking, card: Kind = Booking) -> tuple[Town, Pipeline]:
    """{seat, room} -> card."""
    town = Town()
    pipeline = (
        Pipeline(name="trip")
        .with_stage("seat", seat(town, "seat"))
        .with_stage("room", room(town, "room"))
        .with_stage("card", card(town, "card"), dependencies=("seat", "room"))
    )
    return town, pipeline


def verified(town: Town, pipeline: Pipeline, policy: Policy | None = None, **options: Any) -> Verification:
    return run(verify(pipeline, policy, town, **options))


def refuted(town: Town, pipeline: Pipeline, policy: Policy | None = None, **options: Any) -> dict[tuple[str, Fault], list[Trial]]:
    """What was wrong, by stage and fault."""
    with pytest.raises(VerificationFailed) as failed:
        verified(town, pipeline, policy, **options)
    verification = failed.value.verification
    assert not verification.ok
    assert str(verification) in str(failed.value)
    found: dict[tuple[str, Fault], list[Trial]] = {}
    for trial in verification.trials:
        if not trial.ok:
            found.setdefault((trial.stage, trial.fault), []).append(trial)
    return found


def endings(verification: Verification, stage: str, fault: Fault) -> set[tuple[SagaStatus, ...]]:
    return {trial.ending for trial in verification.trials if (trial.stage, trial.fault) == (stage, fault)}


# -- where nothing is wrong ------------------------------------------------------------------------------------------


def test_a_saga_as_it_should_be_passes_and_every_fault_strikes_every_stage() -> None:
    town, pipeline = trip()

    verification = verified(town, pipeline)

    assert verification.ok
    assert verification.stages == ("seat", "room", "card")
    assert {(trial.stage, trial.fault) for trial in verification.trials if trial.stage} == {
        (stage, fault) for stage in ("seat", "room", "card") for fault in Fault
    }
    for stage in verification.stages:
        for fault in (Fault.RAISES_BEFORE, Fault.RAISES_AFTER, Fault.TIMES_OUT_BEFORE, Fault.TIMES_OUT_AFTER, Fault.INTERRUPTED_AFTER):
            assert endings(verification, stage, fault) == {(COMPENSATED,)}
        assert endings(verification, stage, Fault.CANCELS) == {(SagaStatus.CANCELLED,)}
        assert endings(verification, stage, Fault.UNDO_REPEATED) == {(COMPENSATED,)}
        assert endings(verification, stage, Fault.UNDO_FAILS) == {(STUCK, COMPENSATED)}


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "in memory"])
def test_the_process_dies_before_every_event_there_and_back(durable: bool) -> None:
    town = Town()
    pipeline = Pipeline(name="two").with_stage("a", Booking(town, "a")).with_stage("b", Booking(town, "b"), dependencies=("a",))

    verification = verified(town, pipeline, faults=[Fault.KILLED_BEFORE], durable=durable)

    there, back, on_demand = asyncio.run(events_of(pipeline))
    trials = verification.trials
    assert len(trials) == there + back + on_demand
    assert [trial.ending for trial in trials[:there]] == [(), *[(COMPLETED,)] * (there - 1)]
    assert [trial.ending for trial in trials[there : there + back]] == [(), *[(COMPENSATED,)] * (back - 1)]
    assert [trial.ending for trial in trials[there + back :]] == [(COMPLETED,), *[(COMPENSATED,)] * (on_demand - 1)]


async def events_of(pipeline: Pipeline) -> tuple[int, int, int]:
    """How many events a saga of these stages has: there; back, where the last one fails; and those of its undoing on demand."""
    coordinator = SagaCoordinator()

    async def fail(_: Any) -> None:
        raise OSError("no")

    async def look(_: Any) -> None:
        """Nothing landed."""

    failing = compensable(fail, fail, probe=look)
    *_, last = pipeline.stages
    broken = Pipeline(pipeline.name, pipeline.stages | {last: replace(pipeline.stages[last], runner=failing)})
    await coordinator.run(pipeline, saga_id="there")
    there = len(await coordinator.ledger.read("there"))
    await coordinator.run(broken, saga_id="back")
    await coordinator.compensate("there", pipeline)
    return there, len(await coordinator.ledger.read("back")), len(await coordinator.ledger.read("there")) - there


def test_a_point_of_no_return_and_what_comes_after_it() -> None:
    town = Town()
    pipeline = (
        Pipeline(name="shop")
        .with_stage("reserve", Booking(town, "reserve"))
        .with_stage("sell", Sale(town, "sell"), dependencies=("reserve",))
        .with_stage("ship", Booking(town, "ship"), dependencies=("sell",))
    )

    verification = verified(town, pipeline)

    # Behind the pivot the saga halts, and when the fault is mended it goes on to its end.
    assert endings(verification, "ship", Fault.RAISES_BEFORE) == {(HALTED, COMPLETED)}
    assert endings(verification, "sell", Fault.RAISES_BEFORE) == {(COMPENSATED,)}
    assert endings(verification, "sell", Fault.RAISES_AFTER) == {(HALTED, COMPLETED)}
    # What stands before it is undone only when it fails.
    assert endings(verification, "reserve", Fault.UNDO_FAILS) == {(STUCK, COMPENSATED)}
    # The pivot itself has nothing to undo.
    assert endings(verification, "sell", Fault.UNDO_FAILS) == set()


def test_a_nested_saga_is_failed_in_each_of_its_own_stages() -> None:
    town = Town()
    _, inner = trip()
    inner = Pipeline(name="hotel")
    for name, needs in (("room", ()), ("deposit", ("room",))):
        inner = inner.with_stage(name, Booking(town, name), dependencies=needs)
    pipeline = (
        Pipeline(name="journey")
        .with_stage("seat", Booking(town, "seat"))
        .with_stage("hotel", nested(inner), dependencies=("seat",))
        .with_stage("card", Booking(town, "card"), dependencies=("hotel",))
    )

    verification = verified(town, pipeline)

    assert verification.stages == ("seat", "hotel", "hotel/room", "hotel/deposit", "card")
    assert endings(verification, "hotel/deposit", Fault.RAISES_AFTER) == {(COMPENSATED,)}
    assert endings(verification, "hotel/room", Fault.UNDO_FAILS) == {(STUCK, COMPENSATED)}
    assert {trial.stage for trial in verification.trials if trial.fault is Fault.KILLED_AFTER} >= {"hotel/room", "hotel/deposit"}


def test_a_saga_that_goes_on_with_fallbacks() -> None:
    town, pipeline = trip(room=WithFallback)

    verification = verified(town, pipeline, ContinueWithFallback(fallbacks={"seat": {"key": "none"}}))

    assert endings(verification, "room", Fault.RAISES_BEFORE) == {(SagaStatus.DEGRADED,)}
    assert endings(verification, "seat", Fault.RAISES_BEFORE) == {(SagaStatus.DEGRADED,)}
    # What landed needs nothing to stand in for it.
    assert endings(verification, "room", Fault.RAISES_AFTER) == {(COMPLETED,)}


def test_a_saga_that_keeps_what_was_done_is_resumed_when_the_fault_is_mended() -> None:
    town, pipeline = trip()

    verification = verified(town, pipeline, FailFast(on_failure="halt"), faults=[Fault.RAISES_BEFORE])

    assert endings(verification, "card", Fault.RAISES_BEFORE) == {(HALTED, COMPLETED)}


def test_a_pipeline_that_changes_while_it_runs_can_not_go_on_after_a_kill_and_is_found() -> None:
    town = Town()

    class Grows(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            if pipeline.stages.pop("more", None) is None:
                pipeline.stages["more"] = replace(pipeline.stages["book"], name="more", runner=Booking(town, "more"))
            return await super().execute(ctx)

    pipeline = Pipeline(name="trip").with_stage("book", Grows(town, "book"))

    found = refuted(town, pipeline, faults=[Fault.KILLED_AFTER])

    assert any("It could not go on: expected the pipeline that saga" in trial.wrong for trials in found.values() for trial in trials)


def test_a_saga_that_had_come_to_rest_in_doubt_when_its_process_died_is_left_to_a_person() -> None:
    """Two stages side by side: one raises, and the other, which can't be asked, is cancelled; that is so with and without a kill."""
    town = Town()
    pipeline = Pipeline(name="trip").with_stage("note", Recording(town, "note")).with_stage("book", Booking(town, "book"))

    assert verified(town, pipeline, FailFast(in_flight="cancel", on_failure="halt"), faults=[Fault.KILLED_AFTER]).ok


def test_what_is_recorded_can_be_undone_without_a_probe() -> None:
    town, pipeline = trip(card=Recording)

    assert verified(town, pipeline).ok


def test_what_nobody_can_ask_stays_in_doubt_and_the_report_says_so() -> None:
    town, pipeline = trip(seat=Silent)

    verification = verified(town, pipeline, faults=[Fault.TIMES_OUT_BEFORE, Fault.TIMES_OUT_AFTER])

    assert endings(verification, "seat", Fault.TIMES_OUT_BEFORE) == {(STUCK,)}
    assert endings(verification, "seat", Fault.TIMES_OUT_AFTER) == {(STUCK,)}


def test_a_stage_that_is_cancelled_in_flight() -> None:
    town, pipeline = trip()

    verification = verified(town, pipeline, FailFast(in_flight="cancel"), faults=[Fault.INTERRUPTED_BEFORE, Fault.INTERRUPTED_AFTER])

    assert {trial.ending for trial in verification.trials} == {(COMPENSATED,)}


def test_no_time_is_spent_on_waiting_for_the_next_attempt() -> None:
    town, pipeline = trip()
    patient = Retry(attempts=3, wait=3600, wait_max=3600, jitter=False)
    policy = FailFast(retry=patient, compensation=Compensation(retry=patient))

    verification = asyncio.run(asyncio.wait_for(verify(pipeline, policy, town, faults=[Fault.RAISES_BEFORE, Fault.UNDO_FAILS]), 60))

    trial = next(trial for trial in verification.trials if trial.fault is Fault.RAISES_BEFORE)
    assert trial.report is not None
    assert trial.report.stages["seat"].attempts == 3


def test_a_policy_may_name_an_exception_of_a_module_that_a_stage_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is made when it is raised, as botocore's are."""

    class Importing(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            monkeypatch.setitem(sys.modules, "late_bank", ModuleType("late_bank"))
            return await super().execute(ctx)

    town, pipeline = trip(card=Importing)
    named = Retry(attempts=2, wait=5, retry_on="late_bank.Declined")

    verification = verified(town, pipeline, FailFast(retry=named, compensation=Compensation(retry=named)), faults=[Fault.UNDO_REPEATED])

    assert "late_bank" in sys.modules
    assert {trial.ending for trial in verification.trials} == {(COMPENSATED,)}


def test_a_stage_that_has_a_time_limit_of_its_own_for_undoing_is_undone_as_often_as_its_policy_says() -> None:
    class Patient(Booking):
        compensation = Compensation(timeout=120)

    town, pipeline = trip(seat=Patient)

    verification = verified(town, pipeline, IN_ONE_ATTEMPT, faults=[Fault.UNDO_FAILS])

    trial = next(trial for trial in verification.trials if trial.stage == "seat")
    assert trial.report is not None
    undoing = trial.report.stages["seat"].compensation
    assert undoing is not None
    assert undoing.attempts == 1


def test_a_world_and_stages_may_be_asynchronous_and_a_stage_may_be_slow() -> None:
    class Slow(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await elapse(1)  # longer than the kit's own patience
            return await super().execute(ctx)

    class Faraway(Town):
        async def reset(self) -> None:  # type: ignore[override] # it may be either
            super().reset()

        async def look(self) -> Counter[str]:  # type: ignore[override] # as above
            return super().look()

    town = Faraway()
    pipeline = Pipeline(name="slow").with_stage("a", Slow(town, "a"))

    verification = verified(town, pipeline, faults=[Fault.TIMES_OUT_AFTER])

    assert endings(verification, "a", Fault.TIMES_OUT_AFTER) == {(COMPENSATED,)}


def test_a_stage_that_is_slow_gets_its_time_though_the_policy_has_little_patience() -> None:
    class Slow(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await elapse(1)  # longer than the kit's own patience, and than that and the grace
            return await super().execute(ctx)

    verification = verified(*trip(seat=Slow), FailFast(cancel_grace=0.001), faults=[Fault.TIMES_OUT_AFTER])

    assert endings(verification, "seat", Fault.TIMES_OUT_AFTER) == {(COMPENSATED,)}


def test_a_saga_that_needs_its_retries_needs_them_wherever_it_runs() -> None:
    class Hesitant(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            if ctx.attempt == 1:
                raise OSError("not yet")
            return await super().execute(ctx)

    assert verified(*trip(seat=Hesitant), FailFast(retry=Retry(attempts=2)), faults=[Fault.RAISES_BEFORE]).ok


def test_what_is_in_effect_depends_on_what_the_others_gave_that_are_not() -> None:
    class Quote(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await super().execute(ctx)
            return StageOutput.ok(price=10)

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return StageOutput.ok(price=10) if ctx.forward_key in self.town.bookings else None

    class Payment(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            self.town.bookings[ctx.idempotency_key] = f"{ctx.inputs.get_from('quote', 'price')} paid"
            return StageOutput.ok()

    town = Town()
    pipeline = Pipeline(name="pay").with_stage("quote", Quote(town, "quote"))
    pipeline = pipeline.with_stage("pay", Payment(town, "pay"), dependencies=("quote",))
    policy = ContinueWithFallback(fallbacks={"quote": {"price": 7}}, compensation=Compensation(on_failure="continue"))

    verification = verified(town, pipeline, policy, faults=[Fault.RAISES_BEFORE, Fault.UNDO_FAILS])

    # Both times the payment alone stands: once of what a fallback asked for, once of what was quoted.
    assert endings(verification, "quote", Fault.RAISES_BEFORE) == {(SagaStatus.DEGRADED,)}
    assert endings(verification, "pay", Fault.UNDO_FAILS) == {(STUCK, COMPENSATED)}


def test_a_stage_whose_own_fallback_fails_has_the_policys() -> None:
    class Helpless(Booking):
        async def fallback(self, ctx: SagaContext, failure: Failure) -> StageOutput:
            raise OSError("no help")

    policy = ContinueWithFallback(fallbacks={"seat": {"key": "none"}})

    verification = verified(*trip(seat=Helpless), policy, faults=[Fault.RAISES_BEFORE])

    assert endings(verification, "seat", Fault.RAISES_BEFORE) == {(SagaStatus.DEGRADED,)}


@pytest.mark.parametrize("policy", [FailFast(), FailFast(on_failure="halt")], ids=["compensate", "halt"])
@pytest.mark.parametrize("in_group", [False, True], ids=["directly", "in a task group"])
def test_what_a_died_process_left_half_done_is_in_doubt_and_the_world_may_be_there(policy: Policy, in_group: bool) -> None:
    class Unsure(Recording):
        compensate_in_doubt = False

        async def execute(self, ctx: SagaContext) -> None:  # type: ignore[override] # a recorded effect needs no output
            for part in ("there", "back"):
                self.town.bookings[f"{ctx.idempotency_key} {part}"] = f"{self.name} {part}"
                if in_group:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(ctx.record(part))
                else:
                    await ctx.record(part)

    town = Town()
    pipeline = Pipeline(name="one").with_stage("a", Unsure(town, "a"))

    verification = verified(town, pipeline, policy, faults=[Fault.KILLED_BEFORE, Fault.KILLED_AFTER])

    halfway = [trial for trial in verification.trials if trial.events == ("EffectRecorded",)]
    assert {trial.ending for trial in halfway} <= {(STUCK,), (HALTED,)}
    assert len(halfway) == 4


def test_many_stages_in_doubt_at_once_are_told_apart_in_few_worlds() -> None:
    town, pipeline = Town(), Pipeline(name="many")
    for number in range(12):
        pipeline = pipeline.with_stage(f"s{number}", Unasked(town, f"s{number}"))

    verification = verified(town, pipeline, faults=[Fault.KILLED_AFTER], leave_out=["s11"])

    assert max(len(trial.report.in_doubt) for trial in verification.trials if trial.report) == 12
    assert town.resets < 3 * len(verification.trials)


class SlowLiar(Lying):
    """Has its effect when nobody waits for it any more, and says that nothing landed."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        await elapse(1)
        return await super().execute(ctx)


def test_an_effect_lands_after_the_time_is_up_however_long_it_takes() -> None:
    town, pipeline = trip(seat=SlowLiar)

    assert set(refuted(town, pipeline, faults=Fault.TIMES_OUT_AFTER)) == {("seat", Fault.TIMES_OUT_AFTER)}


class Blocking(Booking):
    """Never awaits while it works, as code does that asks a database without a thread."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ControlledLoop)
        loop.compute(1)
        return await super().execute(ctx)


def test_a_stage_that_lets_nobody_else_run_while_it_works_is_struck_all_the_same() -> None:
    verification = verified(*trip(seat=Blocking, room=Blocking), faults=Fault.TIMES_OUT_AFTER)

    assert {trial.stage for trial in verification.trials if trial.reached} == {"seat", "room", "card"}


class Tour(CompensableStage):
    """Runs two sagas, one after the other."""

    idempotent = True
    compensate_in_doubt = True

    def __init__(self, town: Town) -> None:
        self.parts = {name: Pipeline(name=name).with_stage(f"{name}_room", Booking(town, name)) for name in ("paris", "rome")}

    async def execute(self, ctx: SagaContext) -> None:
        standing = {child.pipeline: child for child in await ctx.child_sagas() if child.status is not COMPENSATED}
        for name, part in self.parts.items():
            left = standing.get(name)
            report = await (ctx.run_saga(part) if left is None else ctx.resume_saga(left.saga_id, part))
            report.raise_for_status()

    async def compensate(self, ctx: CompensationContext) -> None:
        for child in reversed(await ctx.child_sagas()):
            await ctx.undo_saga(child.saga_id, self.parts[child.pipeline])


def test_a_stage_that_runs_several_sagas_is_verified_with_all_of_them() -> None:
    town = Town()
    pipeline = Pipeline(name="journey").with_stage("seat", Booking(town, "seat")).with_stage("tour", Tour(town), dependencies=("seat",))

    assert verified(town, pipeline).stages == ("seat", "tour", "tour/paris_room", "tour/rome_room")


def test_a_stage_that_runs_a_saga_and_has_an_effect_of_its_own_may_be_in_doubt_about_that() -> None:
    """The report says so; the kit is not to take it for a report that nothing of it stands."""
    town = Town()

    class Guided(Tour):
        async def execute(self, ctx: SagaContext) -> None:
            town.bookings[ctx.idempotency_key] = "guide"
            await super().execute(ctx)

        async def compensate(self, ctx: CompensationContext) -> None:
            await super().compensate(ctx)
            town.bookings.pop(ctx.forward_key, None)

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            if ctx.forward_key not in town.bookings:
                return None
            if all(child.ok for child in await ctx.child_sagas()):
                return StageOutput.ok()
            raise LookupError("only a part of it")

    pipeline = Pipeline(name="journey").with_stage("tour", Guided(town))

    verification = verified(town, pipeline, FailFast(on_failure="halt"), faults=[Fault.RAISES_BEFORE])

    halted = [trial.report for trial in verification.trials if trial.stage == "tour/paris_room"]
    assert [report is not None and [*report.in_doubt] for report in halted] == [["tour"]]


def test_a_nested_saga_with_a_stage_in_doubt_is_in_doubt() -> None:
    town = Town()
    inner = Pipeline(name="hotel")
    for name, kind, needs in (("room", Booking, ()), ("deposit", Unasked, ("room",))):
        inner = inner.with_stage(name, kind(town, name), dependencies=needs)
    pipeline = Pipeline(name="journey").with_stage("hotel", nested(inner)).with_stage("seat", Unasked(town, "seat"))

    verification = verified(town, pipeline, FailFast(on_failure="halt"), faults=[Fault.KILLED_BEFORE])

    reports = [trial.report for trial in verification.trials if trial.report is not None]
    assert any({"hotel", "seat"} <= report.in_doubt.keys() for report in reports)


def test_a_point_of_no_return_within_a_nested_saga() -> None:
    town = Town()
    inner = (
        Pipeline(name="shop")
        .with_stage("reserve", Booking(town, "reserve"))
        .with_stage("sell", Sale(town, "sell"), dependencies=("reserve",))
        .with_stage("ship", Booking(town, "ship"), dependencies=("sell",))
    )
    pipeline = Pipeline(name="order").with_stage("shop", nested(inner)).with_stage("thank", Booking(town, "thank"), dependencies=("shop",))

    verification = verified(town, pipeline)

    # Once the nested saga has completed none of its stages is ever undone; so it is stopped within.
    assert endings(verification, "shop/reserve", Fault.UNDO_FAILS) == {(STUCK, COMPENSATED)}
    assert endings(verification, "shop/ship", Fault.UNDO_REPEATED) == {(HALTED, COMPLETED)}
    assert endings(verification, "shop", Fault.UNDO_FAILS) == set()
    # The process dies on the way back of the nested saga, too, and every write is told by its path.
    writes = {(trial.stage, event) for trial in verification.trials for event in trial.events}
    assert ("shop/reserve", "CompensationCompleted") in writes
    assert {stage for stage, _ in writes} <= {"", *verification.stages}


# -- what it finds ---------------------------------------------------------------------------------------------------


def test_a_lost_answer_of_a_stage_that_nobody_can_ask_is_found() -> None:
    found = refuted(*trip(card=Silent))

    assert found.keys() == {("card", Fault.RAISES_AFTER)}
    (trial,) = found["card", Fault.RAISES_AFTER]
    assert trial.wrong.startswith("By the report it is compensated, nothing is in effect.")
    assert "'card': 1" in trial.wrong


def test_a_compensation_that_undoes_nothing_is_found() -> None:
    found = refuted(*trip(seat=Forgetful))

    assert {("card", Fault.RAISES_BEFORE), ("seat", Fault.UNDO_REPEATED), ("card", Fault.KILLED_AFTER)} <= found.keys()


def test_a_compensation_that_undoes_nothing_is_named_and_nothing_else_is_advised() -> None:
    with pytest.raises(VerificationFailed) as failed:
        verified(*trip(room=Forgetful))

    said = str(failed.value)
    assert "\ncompensate() of room leaves something behind, or undoes what is not its own. Have it undo all that its stage did" in said
    assert "bear repetition" not in said
    assert "probe()" not in said


def test_a_compensation_that_undoes_only_what_has_completed_is_named_for_what_was_recorded() -> None:
    class Formal(Recording):
        async def compensate(self, ctx: CompensationContext) -> None:
            if ctx.output is not None:
                await super().compensate(ctx)

    with pytest.raises(VerificationFailed) as failed:
        verified(*trip(card=Formal), faults=[Fault.RAISES_AFTER])

    assert "compensate() of card leaves something behind" in str(failed.value)
    assert "ctx.record" not in str(failed.value)


class Sweeping(Booking):
    """Undoes whatever it finds."""

    async def compensate(self, ctx: CompensationContext) -> None:
        self.town.bookings.clear()


def test_a_compensation_that_undoes_what_is_not_its_own_is_said_to_do_so() -> None:
    class Inhabited(Town):
        def reset(self) -> None:
            self.bookings = {"theirs": "theirs"}

    town = Inhabited()
    pipeline = Pipeline(name="trip").with_stage("seat", Sweeping(town, "seat"))

    with pytest.raises(VerificationFailed, match=r"compensate\(\) of seat leaves something behind, or undoes what is not its own\."):
        verified(town, pipeline)


def test_of_many_stages_the_one_whose_compensation_undoes_nothing_is_named_by_its_path() -> None:
    town = Town()
    inner, outer = Pipeline(name="hotel"), Pipeline(name="journey").with_stage("seat", Booking(town, "seat"))
    for name, kind, needs in (("room", Booking, ()), ("deposit", Forgetful, ("room",)), ("key", Booking, ("deposit",))):
        inner = inner.with_stage(name, kind(town, name), dependencies=needs)
    pipeline = outer.with_stage("hotel", nested(inner), dependencies=("seat",))
    pipeline = pipeline.with_stage("card", Booking(town, "card"), dependencies=("hotel",))

    with pytest.raises(VerificationFailed, match=r"compensate\(\) of hotel/deposit leaves something behind, or"):
        verified(town, pipeline)


def test_the_compensation_of_an_only_stage_that_undoes_nothing_is_named() -> None:
    town = Town()

    with pytest.raises(VerificationFailed, match=r"compensate\(\) of seat leaves something behind, or"):
        verified(town, Pipeline(name="short").with_stage("seat", Forgetful(town, "seat")))


def test_where_a_stage_has_run_twice_it_is_not_its_compensation_that_is_blamed() -> None:
    class Twofold(Silent):
        compensate_in_doubt = True

        async def execute(self, ctx: SagaContext) -> StageOutput:
            self.town.bookings[f"{ctx.idempotency_key} {ctx.attempt}"] = self.name
            return StageOutput.ok()

        async def compensate(self, ctx: CompensationContext) -> None:
            self.town.bookings.pop(f"{ctx.forward_key} 1", None)

    with pytest.raises(VerificationFailed) as failed:
        verified(*trip(card=Twofold), FailFast(retry=Retry(attempts=2)), faults=Fault.TIMES_OUT_AFTER, leave_out=["seat", "room"])

    (trial,) = failed.value.verification.trials
    assert trial.report is not None
    assert (trial.report.stages["card"].attempts, "card" in trial.report.undone) == (2, True)
    assert "Its probe() has to find what landed" in str(failed.value)
    assert "leaves something behind" not in str(failed.value)


def test_where_nothing_was_undone_no_compensation_is_blamed() -> None:
    town = Town()

    async def label(_: StageContext) -> None:
        town.bookings["label"] = "label"
        await elapse(1)

    pipeline = Pipeline(name="parcel").with_stage("label", label, "work").with_stage("card", Booking(town, "card"))

    with pytest.raises(VerificationFailed) as failed:
        verified(town, pipeline, FailFast(in_flight="cancel"), faults=Fault.RAISES_BEFORE, leave_out="label")

    (trial,) = failed.value.verification.trials
    assert trial.report is not None
    assert (trial.report.undone, trial.wrong.partition(".")[0]) == ({}, "By the report it is compensated, nothing is in effect")
    assert "compensate()" not in str(failed.value)


def test_a_compensation_that_does_not_bear_repetition_is_found() -> None:
    found = refuted(*trip(room=Literal), IN_ONE_ATTEMPT)

    # What is found of every stage that nobody can ask is not for this.
    for lost in refuted(*trip(room=Silent), IN_ONE_ATTEMPT):
        del found[lost]
    assert ("room", Fault.UNDO_REPEATED) in found
    assert {stage for stage, fault in found if fault is not Fault.KILLED_BEFORE} == {"room"}
    assert {fault for _, fault in found} <= {Fault.UNDO_REPEATED, Fault.KILLED_BEFORE, Fault.UNDO_FAILS}


def test_a_compensation_that_does_not_bear_repetition_passes_where_its_probe_makes_up_for_it() -> None:
    class Asked(Literal):
        probe = Booking.probe

    assert verified(*trip(room=Asked), IN_ONE_ATTEMPT).ok


def test_a_stage_that_does_its_deed_again_at_every_attempt_is_found() -> None:
    found = refuted(*trip(seat=Eager), FailFast(on_failure="halt", retry=Retry(attempts=2)))

    assert ("seat", Fault.RAISES_AFTER) in found


def test_a_probe_that_does_not_find_what_landed_is_found() -> None:
    found = refuted(*trip(seat=Lying))

    assert {("seat", Fault.TIMES_OUT_AFTER), ("seat", Fault.RAISES_AFTER)} <= found.keys()
    assert ("seat", Fault.RAISES_BEFORE) not in found


def test_a_probe_that_finds_what_never_landed_is_found_though_it_is_undone() -> None:
    found = refuted(*trip(card=Boasting), faults=[Fault.TIMES_OUT_BEFORE])

    (trial,) = found["card", Fault.TIMES_OUT_BEFORE]
    assert trial.ending == (COMPENSATED,)
    assert trial.wrong == "The probe of card said that its effect had landed, and its code had never run."


class Offer(Booking):
    async def execute(self, ctx: SagaContext) -> StageOutput:
        await super().execute(ctx)
        return StageOutput.ok(price=10)


class Purchase(Booking):
    """Needs the price, and gets it from the offer."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        if ctx.inputs.get("price") != 10:
            raise LookupError("for how much?")
        return await super().execute(ctx)


def offered() -> tuple[Town, Pipeline]:
    """offer -> buy."""
    town = Town()
    pipeline = Pipeline(name="shop").with_stage("offer", Offer(town, "offer"))
    return town, pipeline.with_stage("buy", Purchase(town, "buy"), dependencies=("offer",))


def test_a_probe_that_gives_less_than_its_stage_is_found_though_all_is_undone() -> None:
    found = refuted(*offered(), FailFast(retry=Retry(attempts=2)), faults=[Fault.TIMES_OUT_AFTER, Fault.KILLED_BEFORE])

    assert found.keys() == {("offer", Fault.TIMES_OUT_AFTER), ("offer", Fault.KILLED_BEFORE)}
    (timed_out,), (died,) = found.values()
    assert timed_out.ending == died.ending == (COMPENSATED,)
    assert timed_out.wrong == died.wrong
    assert died.wrong == "It is compensated, though nothing made this fail: stage 'buy' raised at attempt 2: LookupError: for how much?"


def test_what_can_not_go_on_from_a_fallback_is_held_against_nobody() -> None:
    policy = ContinueWithFallback(fallbacks={"offer": {}})

    verification = verified(*offered(), policy, faults=[Fault.RAISES_BEFORE])

    assert endings(verification, "offer", Fault.RAISES_BEFORE) == {(COMPENSATED,)}


def test_what_raises_because_the_saga_is_cancelled_is_held_against_nobody() -> None:
    class Obedient(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await elapse(1)
            if ctx.is_cancelled:
                raise RuntimeError("stopped, as it was asked to")
            return await super().execute(ctx)

    town = Town()
    pipeline = Pipeline(name="both").with_stage("obey", Obedient(town, "obey")).with_stage("book", Booking(town, "book"))

    verification = verified(town, pipeline, faults=Fault.CANCELS)

    assert endings(verification, "book", Fault.CANCELS) == {(COMPENSATED,)}


def test_a_stage_that_fails_by_itself_is_not_to_be_left_out_for_it() -> None:
    class Moody(Booking):
        def __init__(self, town: Town, name: str) -> None:
            super().__init__(town, name)
            self.runs = 0

        async def execute(self, ctx: SagaContext) -> StageOutput:
            self.runs += 1
            if self.runs == 3:  # those before see whether anything can be verified
                raise OSError("not today")
            return await super().execute(ctx)

    with pytest.raises(VerificationFailed) as failed:
        verified(*trip(card=Moody), faults=Fault.RAISES_AFTER, leave_out=["seat", "room"])

    assert "It is compensated, though nothing made this fail: stage 'card' raised: OSError: not today" in str(failed.value)
    assert "leave it out" not in str(failed.value)


def test_a_probe_may_find_what_code_has_done_that_was_given_up_and_goes_on() -> None:
    class Dogged(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            output = await super().execute(ctx)
            with suppress(asyncio.CancelledError):
                await elapse(60)
            await elapse(60)
            return output

    verification = verified(*trip(seat=Dogged), FailFast(drain_timeout=1, cancel_grace=1), faults=[Fault.KILLED_BEFORE])

    assert {trial.ending for trial in verification.trials} == {(), (COMPENSATED,), (COMPLETED,)}


def test_an_output_that_no_durable_ledger_can_keep_is_found_unless_none_is_wanted() -> None:
    class Connected(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await super().execute(ctx)
            return StageOutput.ok(connection=object())

    with pytest.raises(MisuseError, match=r"data\['connection'\]"):
        verified(*trip(seat=Connected))
    assert verified(*trip(seat=Connected), durable=False, faults=[Fault.KILLED_AFTER]).ok


def test_a_compensation_that_needs_more_of_an_output_than_is_stored_is_found() -> None:
    @dataclass
    class Ticket:
        key: str

    class Typed(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await super().execute(ctx)
            return StageOutput.ok(ticket=Ticket(ctx.idempotency_key))

        async def compensate(self, ctx: CompensationContext) -> None:
            assert ctx.output is not None
            self.town.bookings.pop(ctx.output.data["ticket"].key, None)

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return StageOutput.ok(ticket=Ticket(ctx.forward_key)) if ctx.forward_key in self.town.bookings else None

    found = refuted(*trip(seat=Typed), faults=[Fault.KILLED_BEFORE])

    # What is read again has a dict in the ticket's place.
    assert {stage for stage, _ in found} <= {"seat", "room", "card", ""}
    assert all("AttributeError: 'dict' object has no attribute 'key'" in trial.wrong for trials in found.values() for trial in trials)
    assert verified(*trip(seat=Typed), faults=[Fault.KILLED_BEFORE], durable=False).ok


def test_an_output_that_does_not_fit_its_model_keeps_nothing_from_being_undone() -> None:
    @dataclass
    class Ticket:
        number: int

    class Modelled(Booking):
        output_model = Ticket

        async def execute(self, ctx: SagaContext) -> StageOutput:
            await super().execute(ctx)
            return StageOutput.ok(number="none")

    assert verified(*trip(seat=Modelled)).ok


def test_of_an_output_that_fits_its_model_nothing_else_is_said_while_the_saga_is_failed(caplog: pytest.LogCaptureFixture) -> None:
    class Seat(BaseModel):
        seat: str

    class Typed(Booking):
        output_model = Seat

        async def execute(self, ctx: SagaContext) -> StageOutput:
            await super().execute(ctx)
            return StageOutput.ok(seat="14A")

    town, pipeline = trip(seat=Typed)

    with caplog.at_level(logging.WARNING, "saga"):
        verified(town, pipeline, faults=[Fault.RAISES_BEFORE, Fault.UNDO_FAILS])

    assert [record.getMessage() for record in caplog.records] == []


def test_a_compensation_that_fails_though_nothing_made_it_fail_is_found() -> None:
    class Mistyped(Booking):
        async def compensate(self, ctx: CompensationContext) -> None:
            self.town.boookings.pop(ctx.forward_key)  # type: ignore[attr-defined] # that is the point

    found = refuted(*trip(seat=Mistyped))

    # Each report is true: it is stuck, and the seat is taken.
    (trial,) = found["card", Fault.RAISES_BEFORE]
    assert trial.wrong.startswith("It is stuck, though nothing made this fail: stage 'seat' could not be compensated")
    assert trial.wrong.endswith("AttributeError: 'Town' object has no attribute 'boookings'")


def test_a_compensation_that_fails_by_itself_is_not_to_be_left_out_for_it() -> None:
    class Mistyped(Booking):
        async def compensate(self, ctx: CompensationContext) -> None:
            raise TypeError("a typo")

    with pytest.raises(VerificationFailed) as failed:
        verified(*trip(seat=Mistyped), faults=Fault.UNDO_REPEATED)

    assert "though nothing made this fail: stage 'seat' could not be compensated" in str(failed.value)
    assert "leave it out" not in str(failed.value)


def test_what_failed_by_itself_comes_without_advice_on_the_world() -> None:
    class Mistyped(Booking):
        async def compensate(self, ctx: CompensationContext) -> None:
            raise TypeError("a typo")

    with pytest.raises(VerificationFailed) as failed:
        verified(*trip(seat=Mistyped), faults=[Fault.RAISES_BEFORE])

    assert str(failed.value).endswith("TypeError: a typo")


def test_a_probe_that_fails_though_nothing_made_it_fail_is_found() -> None:
    class Mistyped(Booking):
        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return self.town.boookings[ctx.forward_key]  # type: ignore[attr-defined, no-any-return] # that is the point

    found = refuted(*trip(seat=Mistyped))

    assert {("seat", Fault.TIMES_OUT_BEFORE), ("seat", Fault.TIMES_OUT_AFTER)} <= found.keys()


@pytest.mark.parametrize("stage", ["admit", "enter/admit"])
def test_a_stage_that_never_goes_through_once_it_has_failed_is_found(stage: str) -> None:
    async def admit(ctx: Any) -> None:
        if ctx.idempotency_key in admitted:
            raise OSError("not you again")
        admitted.add(ctx.idempotency_key)

    class Guarded(Town):
        def reset(self) -> None:
            super().reset()
            admitted.clear()

    admitted: set[str] = set()
    town = Guarded()
    pipeline = Pipeline(name="one").with_stage("seat", Booking(town, "seat")).with_stage("admit", admit, "guard", dependencies=("seat",))

    halting = FailFast(on_failure="halt")
    if stage.startswith("enter/"):
        pipeline = Pipeline(name="outer").with_stage("enter", nested(pipeline, halting))

    found = refuted(town, pipeline, halting, faults=[Fault.RAISES_AFTER])

    (trial,) = found[stage, Fault.RAISES_AFTER]
    why = f"stage '{stage}' raised at attempt 2: OSError: not you again"
    assert trial.wrong == f"The fault was mended, and it is halted all the same: {why}"


def test_what_fails_by_itself_when_the_fault_is_mended_is_said_once() -> None:
    class Needing(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            if not ctx.inputs.get("key"):
                raise LookupError("no key")
            return await super().execute(ctx)

    class Dropping(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            output = await super().execute(ctx)
            return output if ctx.attempt == 1 else StageOutput.ok()

    town = Town()
    pipeline = Pipeline(name="trip").with_stage("seat", Dropping(town, "seat"))
    pipeline = pipeline.with_stage("card", Needing(town, "card"), dependencies=("seat",))

    found = refuted(town, pipeline, FailFast(on_failure="halt"), faults=[Fault.RAISES_BEFORE])

    (trial,) = found["seat", Fault.RAISES_BEFORE]
    assert trial.ending == (HALTED, HALTED)
    assert trial.wrong == "It is halted, though nothing made this fail: stage 'card' raised: LookupError: no key"


def test_what_a_stage_keeps_in_itself_is_gone_with_its_process() -> None:
    class Remembering(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            self.key = ctx.idempotency_key
            return await super().execute(ctx)

        async def compensate(self, ctx: CompensationContext) -> None:
            self.town.bookings.pop(self.key, None)

    town = Town()
    pipeline = Pipeline(name="one").with_stage("a", Remembering, config={"town": town, "name": "a"})

    found = refuted(town, pipeline)

    # A saga that is resumed in the same process has new stages, too.
    assert {fault for _, fault in found} == {Fault.UNDO_FAILS, Fault.KILLED_BEFORE, Fault.KILLED_AFTER}
    assert "'Remembering' object has no attribute 'key'" in found["a", Fault.KILLED_AFTER][0].wrong


def test_an_effect_of_a_plain_stage_is_found() -> None:
    async def notify(_: Any) -> None:
        town.bookings["note"] = "note"

    town = Town()
    pipeline = Pipeline(name="one").with_stage("notify", notify, "work")

    assert refuted(town, pipeline, faults=[Fault.RAISES_AFTER]).keys() == {("notify", Fault.RAISES_AFTER)}


def test_stages_that_only_work_together_are_found() -> None:
    class Demanding(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            if len(self.town.bookings) < 2:
                return StageOutput.fail("where are the others?")
            return await super().execute(ctx)

    town, pipeline = trip(card=Demanding)
    policy = FailFast(compensation=Compensation(on_failure="continue", retry=Retry(attempts=1)))

    found = refuted(town, pipeline, policy, faults=[Fault.UNDO_FAILS])

    (trial,) = found["card", Fault.UNDO_FAILS]
    assert "expected stages that run in a world in which no others do (card)" in trial.wrong


def test_a_fault_that_never_strikes_is_said_and_can_be_left_out() -> None:
    async def choose(_: Any) -> StageOutput:
        return StageOutput.ok(skip_reason="it is no gift")

    town = Town()
    pipeline = (
        Pipeline(name="gifts")
        .with_stage("choose", choose, "transform")
        .with_stage("wrap", Booking(town, "wrap"), dependencies=("choose",), conditional=True)
        .with_stage("send", Booking(town, "send"), dependencies=("wrap",))
    )

    with pytest.raises(VerificationFailed) as failed:
        verified(town, pipeline)

    assert {trial.stage for trial in failed.value.verification.trials if not trial.reached} == {"wrap"}
    assert "It never struck, so nothing is known of it." in str(failed.value)
    verification = verified(town, pipeline, leave_out=["wrap"])
    assert "wrap" not in {trial.stage for trial in verification.trials if trial.fault is not Fault.KILLED_BEFORE and trial.stage}


def test_what_is_resumed_is_what_a_durable_ledger_gives(tmp_path: Path) -> None:
    @dataclass
    class Fare:
        amount: int

    class Odd(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await super().execute(ctx)
            await ctx.record({"pair": (1, 2)})
            return StageOutput.ok(pair=(1, 2), when=datetime(2026, 1, 1, tzinfo=UTC), large=10**30, none=None, fare=Fare(1))

    async def fail(_: Any) -> None:
        raise OSError("no")

    async def play(ledger: Ledger) -> dict[str, list[Any]]:
        town = Town()
        inner = Pipeline(name="inner").with_stage("a", Odd(town, "a"))
        pipeline = Pipeline(name="outer").with_stage("inner", nested(inner)).with_stage("b", Odd(town, "b"), dependencies=("inner",))
        await SagaCoordinator(ledger=ledger).run(pipeline.with_stage("fail", fail, "work", dependencies=("b",)), saga_id="same")
        given = ("stage", "output", "effect", "execution", "in_doubt", "status")
        return {
            entry.saga_id: [(type(event), *(getattr(event, part, None) for part in given)) for event in await ledger.read(entry.saga_id)]
            for entry in await ledger.list()
        }

    async def compare() -> None:
        real = SQLiteLedger(tmp_path / "ledger.sqlite")
        found = await play(real)
        await real.close()
        assert await play(MortalLedger(durable=True)) == found
        assert await play(MortalLedger(durable=False)) != found

    asyncio.run(compare())


# -- what can't be verified ------------------------------------------------------------------------------------------


def test_a_saga_that_fails_by_itself_is_refused() -> None:
    async def declined(_: Any) -> StageOutput:
        return StageOutput.fail("declined")

    town, pipeline = trip(card=lambda town, name: compensable(declined, Booking(town, name).compensate))

    with pytest.raises(MisuseError, match=r"(?s)a saga that completes with this input.*declined"):
        verified(town, pipeline)


def test_a_world_that_cannot_be_reset_is_refused() -> None:
    class Stubborn(Town):
        def reset(self) -> None: ...

    town = Stubborn()

    with pytest.raises(MisuseError, match=r"(?s)a world that reset\(\) puts back.*\+.*'a': 1"):
        verified(town, Pipeline(name="one").with_stage("a", Booking(town, "a")))


def test_a_world_that_never_looks_the_same_is_refused() -> None:
    class Numbered(Town):
        numbers = 0

        def look(self) -> Counter[str]:
            Numbered.numbers += bool(self.bookings)
            return super().look() + Counter({"number": Numbered.numbers} if self.bookings else {})

    town = Numbered()

    with pytest.raises(MisuseError, match="Leave out of look"):
        verified(town, Pipeline(name="one").with_stage("a", Booking(town, "a")))


@pytest.mark.parametrize("path", ["room", "hotel/room"])
def test_an_effect_of_a_stage_that_says_it_skipped_is_not_to_be_left_out_of_the_world_alone(path: str) -> None:
    class Done(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await super().execute(ctx)
            return StageOutput.skip("it is done")

    town, pipeline = trip(room=Done)
    if path.startswith("hotel/"):
        pipeline = Pipeline(name="journey").with_stage("hotel", nested(pipeline))

    with pytest.raises(MisuseError, match=rf"let no stage return SKIP that has had an effect \(skipped: {path}\)"):
        verified(town, pipeline)


def test_a_world_that_does_not_show_what_the_saga_does_is_refused() -> None:
    class Blind(Town):
        def look(self) -> None:  # type: ignore[override] # somebody forgot the return
            super().look()

    town = Blind()

    with pytest.raises(MisuseError, match=r"a look\(\) that shows what the saga does, got the same before it and after it: None"):
        verified(town, Pipeline(name="one").with_stage("a", Booking(town, "a")))


@pytest.mark.parametrize("world", [None, Town, FailFast()], ids=["nothing", "a class", "a policy"])
def test_what_is_no_world_is_refused(world: Any) -> None:
    _, pipeline = trip()

    with pytest.raises(MisuseError, match=r"expected a world with reset\(\) and look\(\), got "):
        run(verify(pipeline, None, world))


def test_a_verification_in_no_event_loop_of_asyncio_is_refused_before_the_world_is_reset() -> None:
    """As trio runs it, on which anyio's plugin for pytest runs each test once more."""
    town, pipeline = trip()

    with pytest.raises(MisuseError, match=r"^expected an event loop of asyncio, got none that runs here\. With anyio, choose the backend "):
        verify(pipeline, None, town).send(None)

    assert town.resets == 0


def test_an_id_for_the_saga_is_refused() -> None:
    with pytest.raises(MisuseError, match=r"expected a saga without an id: .*, got saga_id='mine'"):
        verified(*trip(), saga_id="mine")


def test_a_look_that_cannot_be_kept_is_refused() -> None:
    class Lazy(Town):
        def look(self) -> Any:
            return (booking for booking in self.bookings)

    town = Lazy()

    with pytest.raises(MisuseError, match=r"a look\(\) that gives a value to keep and compare, got cannot pickle 'generator' object"):
        verified(town, Pipeline(name="one").with_stage("a", Booking(town, "a")))


class Array:
    """Answers a comparison for each of its parts."""

    def __init__(self, parts: list[object], refusal: type[Exception]) -> None:
        self.parts = parts
        self.refusal = refusal

    def __eq__(self, other: object) -> Any:
        return Array([part == other for part in self.parts], self.refusal)

    __hash__ = None  # type: ignore[assignment] # arrays have none

    def __bool__(self) -> bool:
        raise self.refusal("The truth value of an array is ambiguous.")


@pytest.mark.parametrize("refusal", [ValueError, TypeError, RuntimeError], ids=["numpy", "polars", "torch"])
def test_a_look_that_cannot_be_compared_is_refused(refusal: type[Exception]) -> None:
    class Measured(Town):
        def look(self) -> Any:
            return Array([len(self.bookings), 0], refusal)

    town = Measured()

    with pytest.raises(MisuseError, match=r"a look\(\) that gives a value to keep and compare, got The truth value .* a list for an array"):
        verified(town, Pipeline(name="one").with_stage("a", Booking(town, "a")))


@pytest.mark.parametrize(
    ("faults", "got"), [(["raises befor"], "'raises befor'"), ("raises", "'raises'"), ([], "none")], ids=["a list", "a text", "nothing"]
)
def test_what_is_no_fault_is_refused(faults: Any, got: str) -> None:
    with pytest.raises(MisuseError, match=rf"expected faults to inject \(raises before, .*\), got {got}"):
        verified(*trip(), faults=faults)


def test_one_fault_or_one_stage_needs_no_list() -> None:
    verification = verified(*trip(), faults=Fault.CANCELS, leave_out="seat")

    assert [(trial.stage, trial.fault) for trial in verification.trials] == [("room", Fault.CANCELS), ("card", Fault.CANCELS)]


def test_a_verification_of_nothing_is_refused() -> None:
    with pytest.raises(MisuseError, match="expected a fault that can strike a stage, got cancels at no stage"):
        verified(*trip(), faults=[Fault.CANCELS], leave_out=["seat", "room", "card"])


def test_a_world_whose_values_equal_nothing_is_refused() -> None:
    class Seat:
        def __repr__(self) -> str:
            return "Seat()"

    class Furnished(Town):
        def look(self) -> Any:
            return [Seat()]

    town = Furnished()

    with pytest.raises(MisuseError, match=r"two values that print the same and are not equal: \[Seat\(\)\]"):
        verified(town, Pipeline(name="one").with_stage("a", Booking(town, "a")))


@pytest.mark.parametrize("gives", [object, lambda: float("nan"), iter(range(9)).__next__], ids=["an identity", "no number", "a count"])
def test_a_look_that_gives_another_value_though_nothing_happens_is_refused(gives: Callable[[], Any]) -> None:
    class Furnished(Town):
        def look(self) -> Any:
            return [gives()]

    town = Furnished()

    with pytest.raises(MisuseError, match=r"a look\(\) that gives the same as long as nothing happens, got one that gave \(-\), and then"):
        verified(town, Pipeline(name="one").with_stage("a", Booking(town, "a")))


def test_a_stage_to_leave_out_that_is_not_there_is_refused() -> None:
    with pytest.raises(MisuseError, match="expected stages of pipeline 'trip' to leave out"):
        verified(*trip(), leave_out=["sofa"])


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_a_verification_that_is_cancelled_undoes_the_saga_that_runs_however_often_it_is(times: int) -> None:
    """anyio's scopes cancel at each turn of the loop."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    class Waiting(Booking):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            output = await super().execute(ctx)
            reached.set()
            await go_on.wait()
            return output

    async def play() -> None:
        verification = asyncio.create_task(verify(pipeline, None, town))
        await reached.wait()
        for _ in range(times):
            verification.cancel()
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await verification
        assert town.bookings == {}

    town = Town()
    pipeline = Pipeline(name="one").with_stage("a", Waiting(town, "a"))

    asyncio.run(play())


@pytest.mark.parametrize(
    ("fault", "under_way"),
    [
        (Fault.UNDO_REPEATED, "'trip' was being verified: undo repeated: room"),
        (Fault.KILLED_AFTER, r"'trip' was being verified: killed after: number \d+, where card turns back"),
    ],
)
def test_a_verification_whose_time_is_up_says_what_it_was_at(fault: Fault, under_way: str) -> None:
    class Endless(Booking):
        async def compensate(self, ctx: CompensationContext) -> None:
            await asyncio.Event().wait()

    town, pipeline = trip(room=Endless)

    with pytest.raises(TimeoutError) as ended:
        run(asyncio.wait_for(verify(pipeline, None, town, faults=fault, leave_out=["seat"]), 30))

    assert ended.value.__cause__ is not None
    assert re.fullmatch(under_way, ended.value.__cause__.__notes__[-1])


# -- what it says ----------------------------------------------------------------------------------------------------


def test_the_matrix() -> None:
    town = Town()
    pipeline = (
        Pipeline(name="shop")
        .with_stage("reserve", Booking(town, "reserve"))
        .with_stage("sell", Sale(town, "sell"), dependencies=("reserve",))
    )

    verification = verified(town, pipeline)

    assert str(verification) == MATRIX.strip("\n")


MATRIX = """
shop: wherever it failed, the world was where the report said

            raises  raises  times out  times out  interrupted  interrupted  cancels  undo      undo   killed  killed
            before  after   before     after      before       after                 repeated  fails  before  after
reserve     <       <       <          <          <            <            /        <         !<     . + <   + <
sell        <       =+      <          =+         =+           =+           /                         + <     + <
(the saga)                                                                                            + <

+ completed   < compensated   = halted   / cancelled   ! stuck   . never began
The second of two signs: when the fault was mended and the saga resumed.
"""


def test_a_saga_that_ran_out_of_its_own_time_once_it_was_mended_is_held_against_nobody() -> None:
    async def slow(_: object) -> None:
        await elapse(9)

    report = run(SagaCoordinator(FailFast(deadline=1, on_failure="halt")).run(Pipeline().with_stage("slow", slow, "work")))

    assert report.cause is not None
    assert report.cause.stage is None
    assert _went_on_badly(report) == ""


def test_the_matrix_of_a_saga_that_is_wrong_says_what_and_what_helps() -> None:
    with pytest.raises(VerificationFailed) as failed:
        verified(*trip(card=Silent), faults=[Fault.RAISES_BEFORE, Fault.RAISES_AFTER])

    assert str(failed.value) == WRONG.strip("\n")


def test_a_stage_that_has_a_probe_and_acts_anew_at_each_attempt_is_not_told_to_have_one() -> None:
    class Bank:
        balance = 0

        def reset(self) -> None:
            self.balance = 0

        def look(self) -> int:
            return self.balance

    class Pay(CompensableStage):
        retry = Retry(attempts=2)

        async def execute(self, ctx: SagaContext) -> None:
            bank.balance += 400

        async def compensate(self, ctx: CompensationContext) -> None:
            bank.balance -= 400 if bank.balance else 0

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return StageOutput.ok() if bank.balance else None

    bank = Bank()

    with pytest.raises(VerificationFailed) as failed:
        run(verify(Pipeline(name="p").with_stage("pay", Pay), None, bank, faults=Fault.RAISES_AFTER))

    assert str(failed.value).splitlines()[-1] == (
        "After an attempt that raised the next one runs unasked: let whoever carries it out recognise ctx.idempotency_key, "
        "or have execute() look first whether the effect is there."
    )


WRONG = """
trip: 1 trial went wrong

      raises  raises
      before  after
seat  <       <
room  <       <
card  <       X

< compensated   X wrong

raises after: card
By the report it is compensated, nothing is in effect. Then the world would be (-), and is (+):
    -Counter()
    +Counter({'card': 1})
A lost answer looks like a failure: give the stage a probe(), or ctx.record its effects. A plain stage can have neither.
"""
