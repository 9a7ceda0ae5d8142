"""What people and processes do with a saga in a night, in any order: after each deed what is promised holds, and there is a way home.

`SAGA_CASES` sets the number of cases; `make campaign` runs many more than the test run does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stageflow.api import Pipeline

from saga import LedgerConflict, LedgerError, MisuseError, SagaCoordinator, SagaExists, SagaNotFound, SagaReport, SagaStatus, StageState
from saga.events import event_from_json, event_to_json
from saga.render.advice import what_to_do
from tests.controlled import elapse, run
from tests.families import Leaf, Tree
from tests.test_families import ALIVE, LANDS, InMemory, Life, commands_in, leaves, mishaps, policies
from tests.test_properties import its_words_are_true

CASES = int(os.environ.get("SAGA_CASES", "2000"))
NAMES = "abcde"
DEEDS = ["resume", "forward", "compensate", "recover", "settle", "settle", "settle", "obey", "obey", "mend", "break", "equip", "prune"]
RIVALS = ["resume", "compensate", "settle", "recover", "run", "prune", "cancel"]

# What a stage may be given meanwhile, or lose.
EQUIPPED: Mapping[str, Sequence[str]] = {
    "compensable": ("asked", "sturdy", "fallback"),
    "asked": ("compensable", "sturdy", "fallback"),
    "fallback": ("compensable", "asked", "sturdy"),
    "sturdy": ("compensable", "asked", "fallback"),
    "pivot": ("asked pivot",),
    "asked pivot": ("pivot",),
}


# -- what is drawn ---------------------------------------------------------------------------------------------------


@st.composite
def single(draw: st.DrawFn) -> Tree:
    """A saga whose stages run no others."""
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    shape = {
        name: tuple(sorted(draw(st.sets(st.sampled_from(names[:place]), max_size=2)))) if place else () for place, name in enumerate(names)
    }
    return Tree("p", shape, {name: draw(leaves(hurried=False, pivots=True)) for name in names}, draw(policies(names, hurried=False)))


@st.composite
def mischief(draw: st.DrawFn) -> dict[str, Any]:
    """After how many writes the process dies, when it is cancelled, and when somebody else wants what."""
    happens = draw(mishaps(hurried=False))
    at = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    return {
        "kill": draw(st.one_of(st.none(), st.none(), st.integers(0, 15))),
        "cancel_at": happens["cancel_at"],
        "stops": happens["stops"],
        "rival": draw(st.one_of(st.none(), st.none(), st.tuples(at, st.sampled_from(RIVALS)))),
    }


@st.composite
def deeds(draw: st.DrawFn, names: Sequence[str]) -> dict[str, Any]:
    what = draw(st.sampled_from(DEEDS))
    deed: dict[str, Any] = {"what": what}
    match what:
        case "resume" | "forward":
            deed |= draw(mischief()) | {"policy": draw(st.one_of(st.none(), st.none(), policies(names, hurried=False)))}
        case "compensate" | "recover":
            deed |= draw(mischief())
        case "settle":
            deed["which"] = draw(st.integers(0, 4))
            deed["of"] = draw(st.sampled_from(["open", "open", "open", "all"]))
            deed["verdict"] = draw(st.sampled_from(["undone", "kept", "retry", "undone", "kept", "retry", "gone"]))
            deed["kill"] = draw(st.one_of(st.none(), st.none(), st.just(0)))
        case "mend" | "equip":
            deed |= {"name": draw(st.sampled_from(names)), "which": draw(st.integers(0, 2))}
        case "break":
            deed |= {"name": draw(st.sampled_from(names)), "like": draw(leaves(hurried=False, pivots=True))}
    return deed


@st.composite
def nights(draw: st.DrawFn) -> dict[str, Any]:
    root = draw(single())
    return {
        "root": root,
        "birth": draw(mischief()),
        "deeds": draw(st.lists(deeds([*root.shape]), max_size=6)),
        "is_slow": draw(st.booleans()),
        "home": draw(st.sampled_from(["forward", "back", "as told", "by hand"])),
    }


# -- the night -------------------------------------------------------------------------------------------------------


class Processes(InMemory):
    """Who opens the ledger anew is another process: the one before writes nothing any more."""

    async def reopen(self) -> Any:
        before, self.ledger = self.ledger, type(self.ledger)()
        self.ledger._sagas, self.ledger._children, self.ledger._done = before._sagas, before._children, before._done
        before.left = float("-inf")
        return await super().reopen()


class Night(Life):
    """A saga in the hands of many; its processes may die, and nobody need recover it."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        super().__init__(case, Processes(is_slow=case["is_slow"]))
        # What a fallback stands in for is no foundation of what followed.
        self.world.in_no_order |= {deed["name"] for deed in case["deeds"] if deed["what"] == "equip"}
        self.is_believed: set[str] = set()
        self.failures: set[Any] = set()

    async def live(self) -> None:
        await self.command(lambda saga: saga.run(self.stages(), saga_id="s"), **self.case["birth"])
        if not await self.ledger.read("s"):
            assert not self.world.log
            return
        await self.look()
        for deed in self.case["deeds"]:
            await self.do(**deed)
            if not await self.ledger.read("s"):
                return
            await self.look()
        await self.go_home(self.case["home"])

    def stages(self) -> Pipeline:
        """The pipeline as its code is now, in a process of its own."""
        return self.root.pipeline(self.world)

    # -- one command -------------------------------------------------------------------------------------------------

    async def act(self, deed: Callable[[SagaCoordinator], Coroutine[Any, Any, Any]], **_: Any) -> bool:
        """Do something in a process that nothing happens to. Whether it was refused."""
        self.pipeline = self.stages()
        return await self.command(deed) is not None

    async def command(
        self,
        deed: Callable[[SagaCoordinator], Coroutine[Any, Any, Any]],
        *,
        kill: int | None = None,
        cancel_at: float | None = None,
        stops: tuple[float, int] | tuple[()] = (),
        rival: tuple[float, str] | None = None,
    ) -> MisuseError | None:
        """Give a command in a process of its own; why it was refused, if it was."""
        self.ledger = await self.place.reopen()
        self.ledger.left = float("inf") if kill is None else kill
        self.world.unsure.clear()
        coordinator = SagaCoordinator(self.root.policy, ledger=self.ledger)
        before = await self.state_of_things()
        work = asyncio.ensure_future(deed(coordinator))
        others = [asyncio.ensure_future(self._stop(coordinator, *stops))] if stops else []
        others += [asyncio.ensure_future(self.rival(*rival))] if rival else []
        try:
            if cancel_at is not None:
                await elapse(cancel_at)
                work.cancel()
            answer = await work
            if isinstance(answer, SagaReport):
                assert answer == await coordinator.report("s")
        except asyncio.CancelledError:
            assert cancel_at is not None
        except (LedgerError, OSError):
            assert self.ledger.left < 0
        except MisuseError as refusal:
            assert await self.state_of_things() == before, "it was refused, and something was changed"
            return refusal
        finally:
            await asyncio.gather(*others)
            if self.ledger.left < 0:
                self.world.confirmed -= self.world.unsure
            self.ledger.left = float("inf")
        return None

    async def state_of_things(self) -> Any:
        return await self.history(), [*self.world.log], dict(self.world.standing)

    async def rival(self, at: float, what: str) -> None:
        """Somebody else wants something of a saga that is held: it is refused."""
        await elapse(at)
        [entry] = await self.ledger.list() or [None]
        if entry is None or entry.owner is None:
            return
        rival, before = SagaCoordinator(self.root.policy, ledger=self.ledger), entry.owner
        refusals: tuple[type[Exception], ...] = (LedgerConflict, MisuseError)
        match what:
            case "prune":
                assert not await self.ledger.prune(timedelta(0))
                return
            case "recover":
                assert not (await rival.recover(self.stages())).reports
                return
            case "settle":
                asked: Coroutine[Any, Any, Any] = rival.settle("s", "a", "undone", "looked")
            case "run":
                asked = rival.run(self.stages(), saga_id="s")
            case "cancel":
                asked = rival.cancel("s")
            case _:
                asked = getattr(rival, what)("s", self.stages())
        with pytest.raises(refusals):
            await asked
        [entry] = await self.ledger.list()
        assert entry.owner in {before, None}

    # -- the deeds ---------------------------------------------------------------------------------------------------

    async def do(self, what: str, **how: Any) -> None:
        match what:
            case "resume" | "forward":
                policy, forward = how.pop("policy"), True if what == "forward" else None
                refused = await self.command(lambda saga: saga.resume("s", self.stages(), policy=policy, forward=forward), **how)
                assert refused is None or "in doubt, without a probe and not idempotent" in str(refused)
            case "compensate":
                await self.compensate(**how)
            case "recover":
                was_alive, before = (await self.report()).status in ALIVE, await self.state_of_things()
                assert await self.command(lambda saga: saga.recover(self.stages()), **how) is None
                assert was_alive or await self.state_of_things() == before
                assert how["kill"] is not None or (await self.report()).status not in ALIVE
            case "settle":
                await self.say(**how)
            case "obey":
                await self.do_as_told_once()
            case "mend":
                self.leaves[how["name"]].mend()
            case "break":
                self.break_like(self.leaves[how["name"]], how["like"])
            case "equip":
                self.equip(self.leaves[how["name"]], how["which"])
            case "prune":
                await self.prune()
            case _:
                raise AssertionError(what)

    async def compensate(self, **mischief: Any) -> None:
        assert await self.command(lambda saga: saga.compensate("s", self.stages()), **mischief) is None
        report = await self.report()
        if mischief["kill"] is not None or not report.clean:
            return
        assert report.past_pivot or (report.status is not SagaStatus.HALTED and not self.world.standing)
        before = await self.state_of_things()
        assert not await self.act(lambda saga: saga.compensate("s", self.pipeline))
        assert await self.state_of_things() == before

    async def say(self, which: int, of: str, verdict: str, kill: int | None) -> None:
        """Say something of a stage, having put right by hand what it takes; it is taken just where the report offers it."""
        report = await self.report()
        names = [*report.stuck, *report.in_doubt] if of == "open" else []
        names = names or [*report.stages]
        name = names[which % len(names)]
        is_offered = verdict in report.stages[name].verdicts
        stands = self.world.within("s", name)
        if is_offered and verdict == "undone":
            for key in stands:
                self.world.by_hand(key)
        if is_offered and verdict == "kept" and not stands:
            # Who says so is mistaken, and nobody can know.
            self.is_believed.add(name)
        before = await self.history()
        refused = await self.command(lambda saga: saga.settle("s", name, verdict, "looked"), kill=kill)
        if is_offered and await self.history() == before:
            # The process died with the word: it is said once more.
            refused = await self.command(lambda saga: saga.settle("s", name, verdict, "looked"))
        assert (refused is None) is is_offered, (name, verdict, refused)

    async def do_as_told_once(self) -> None:
        report = await self.report()
        if report.status in ALIVE:
            assert "saga recover goes on with it" in what_to_do(report)[-1]
            assert not await self.act(lambda saga: saga.recover(self.pipeline))
        elif what_to_do(report)[-1] != "Nothing is left to do.":
            for command in commands_in(report):
                await self.obey(*command)

    def break_like(self, leaf: Leaf, other: Leaf) -> None:
        leaf.outcome, leaf.times, leaf.undo_fails, leaf.undo_takes = other.outcome, other.times, other.undo_fails, other.undo_takes
        leaf.lands = other.lands and leaf.outcome in LANDS.get(leaf.kind, {"hang"})
        leaf.unanswered = other.unanswered if leaf.kind.startswith("asked") else 0

    def equip(self, leaf: Leaf, which: int) -> None:
        # Who raises after its effect has landed is to be asked, or lies.
        if leaf.kind in EQUIPPED and not leaf.lands:
            kinds = EQUIPPED[leaf.kind]
            leaf.kind = kinds[which % len(kinds)]

    async def prune(self) -> None:
        """What is forgotten is what asks for nothing more."""
        report = await self.report()
        is_done = report.status not in {*ALIVE, SagaStatus.HALTED, SagaStatus.STUCK}
        assert not is_done or what_to_do(report)[-1] == "Nothing is left to do."
        assert await self.ledger.prune(timedelta(0)) == (("s",) if is_done else ())
        again = await self.command(lambda saga: saga.run(self.stages(), saga_id="s")) if not is_done else None
        assert is_done or isinstance(again, SagaExists)
        assert isinstance(await self.command(lambda saga: saga.cancel("s")), SagaNotFound)

    # -- the way home ------------------------------------------------------------------------------------------------

    async def go_home(self, way: str) -> None:
        if (await self.report()).status in ALIVE:
            assert not await self.act(lambda saga: saga.recover(self.pipeline))
            await self.look()
        match way:
            case "as told":
                await self.do_as_told()
            case "by hand":
                await self.put_right()
            case _:
                await self.come_home(way)

    async def put_right(self) -> None:
        """Nothing is mended: a person undoes by hand what could not be, and the rest is undone."""
        for _ in range(len(self.leaves) + 1):
            report = await self.report()
            for name in (*report.stuck, *report.in_doubt):
                await self.settle(name, "undone")
            await self.act(lambda saga: saga.compensate("s", self.pipeline))
            report = await self.look()
            if report.clean:
                break
        event(f"by hand: {report.status.value}")
        assert report.clean
        assert report.past_pivot or (report.status is not SagaStatus.HALTED and not self.world.standing)

    # -- what holds after each deed ----------------------------------------------------------------------------------

    async def look(self) -> SagaReport:
        report, events = await self.report(), await self.ledger.read("s")
        # Promise 12.
        assert SagaReport.from_events([event_from_json(event_to_json(each)) for each in events]) == report
        its_words_are_true(report, events)
        # Promise 9.
        assert self.failures <= {*report.failures}
        self.failures = {*report.failures}
        assert report.cause is None or report.cause in report.failures
        for stage in report.stages.values():
            # Promise 4, and what a person is asked.
            assert stage.output is not None or stage.state not in {StageState.KEPT, StageState.FALLBACK}
            is_open = report.ended_at is not None and stage.state in {StageState.STUCK, StageState.IN_DOUBT}
            assert bool(stage.verdicts) is is_open
        if report.status in ALIVE:
            assert self.world.refusals == []
            return report
        return await super().look()

    def leaf_agrees(self, report: SagaReport, name: str, *how: Any) -> None:
        if name not in self.is_believed:
            super().leaf_agrees(report, name, *how)


@settings(max_examples=max(CASES // 10, 1), deadline=None, suppress_health_check=list(HealthCheck))
@given(nights())
def test_what_is_promised_holds_all_night_and_there_is_a_way_home(case: Mapping[str, Any]) -> None:
    run(Night(case).live())
