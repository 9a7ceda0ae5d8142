"""Random families of sagas with hard lives: what is promised of one saga holds for those that its stages run, too.

`SAGA_CASES` sets the number of cases; `make campaign` runs many more than the test run does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from stageflow.api import Pipeline

from saga import (
    Compensation,
    ContinueWithFallback,
    FailFast,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Policy,
    Retry,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
)
from saga.ledgers.sqlite import SQLiteLedger
from saga.render.advice import what_to_do
from saga.report import StageReport
from tests.controlled import elapse, run
from tests.families import FamilyWorld, Kin, Leaf, Tree, may_fall_back, tokens
from tests.places import SQLiteFile
from tests.slow import SlowDisk

CASES = int(os.environ.get("SAGA_CASES", "2000"))
S = StageState
ALIVE = {SagaStatus.RUNNING, SagaStatus.COMPENSATING}

# What may land although the stage says that it did not: only where it can be asked, or has recorded it.
LANDS: Mapping[str, set[str]] = {
    "asked": {"raise", "fail", "hang"},
    "asked pivot": {"raise", "fail", "hang"},
    "recording": {"raise", "fail", "cancel", "retry", "hang"},
}
KINDS = ["compensable"] * 4 + ["asked"] * 3 + ["recording"] * 2 + ["sturdy", "sturdy", "fallback", "plain", "pivot", "asked pivot"]


# -- what is drawn ---------------------------------------------------------------------------------------------------


@st.composite
def leaves(draw: st.DrawFn, *, hurried: bool, pivots: bool) -> Leaf:
    kind = draw(st.sampled_from([kind for kind in KINDS if pivots or "pivot" not in kind]))
    bad = ["raise", "fail", "cancel", "retry", "skip"] if hurried else ["raise", "fail", "cancel", "retry", "skip", "hang"]
    outcome = draw(st.one_of(st.just("ok"), st.just("ok"), st.just("ok"), st.sampled_from(bad)))
    moments = st.just(0.0) if hurried else st.sampled_from([0.0, 0.0, 1.0])
    return Leaf(
        kind=kind,
        outcome=outcome,
        times=draw(st.sampled_from([1, 2, 99])),
        lands=outcome in LANDS.get(kind, {"hang"}) and draw(st.booleans()),
        before=draw(moments),
        after=draw(moments),
        undo_fails=draw(st.sampled_from([0, 0, 0, 0, 1, 99])),
        undo_takes=draw(moments),
        unanswered=draw(st.sampled_from([0, 0, 0, 1, 99])) if kind.startswith("asked") else 0,
    )


@st.composite
def policies(draw: st.DrawFn, names: Sequence[str], *, hurried: bool) -> Policy:
    common: dict[str, Any] = {
        "retry": Retry(attempts=draw(st.integers(1, 2)), wait=0.0, jitter=False),
        "timeout": None if hurried else draw(st.sampled_from([None, None, 4.0])),
        "compensation": Compensation(
            retry=Retry(attempts=draw(st.integers(1, 2)), wait=0.0, jitter=False),
            max_concurrency=draw(st.sampled_from([None, None, 1, 2])),
            on_failure=draw(st.sampled_from(["isolate", "isolate", "isolate", "halt"])),
            deadline=None if hurried else draw(st.sampled_from([None, None, None, 0.5, 1.5])),
        ),
        "in_flight": draw(st.sampled_from(["drain", "cancel"])),
        "drain_timeout": None if hurried else draw(st.sampled_from([None, None, 0.5])),
        "cancel_grace": 1000.0,
        "on_failure": draw(st.sampled_from(["compensate", "compensate", "halt"])),
        "on_cancel": draw(st.sampled_from(["keep", "compensate"])),
        "on_interrupt": draw(st.sampled_from(["compensate", "compensate", "halt"])),
        "deadline": None if hurried else draw(st.sampled_from([None, None, None, 4.0])),
    }
    if draw(st.booleans()):
        return FailFast(**common)
    return ContinueWithFallback(
        **common,
        fallbacks={name: {"instead_of": name} for name in draw(st.sets(st.sampled_from(names), max_size=1))},
        without_fallback=draw(st.sampled_from(["fail", "skip_branch"])),
        orphans=draw(st.sampled_from(["compensate", "keep"])),
    )


@st.composite
def trees(draw: st.DrawFn, *, hurried: bool, names: Iterator[str] | None = None, depth: int = 0, pivots: bool = True) -> Tree:
    names = names if names is not None else (f"{letter}{round_ or ''}" for round_ in itertools.count() for letter in "abcdefghijklmnopqrt")
    size = draw(st.integers(2, 4) if depth == 0 else st.integers(1, 3))
    mine = [next(names) for _ in range(size)]
    shape = {
        name: tuple(sorted(draw(st.sets(st.sampled_from(mine[:place]), max_size=2)))) if place else () for place, name in enumerate(mine)
    }
    stages: dict[str, Leaf | Kin] = {}
    has_kin = False
    for place, name in enumerate(mine):
        # The outermost saga has at least one stage that runs another one.
        kinds = ["leaf", "leaf", "nested", "several", "replaced"] if depth == 0 else ["leaf"] * 6 + ["nested", "nested", "replaced"]
        kind = draw(st.sampled_from(kinds if depth < 2 else ["leaf"]))
        if depth == 0 and place == size - 1 and not has_kin:
            kind = "nested"
        has_kin = has_kin or kind != "leaf"
        if kind == "leaf":
            stages[name] = draw(leaves(hurried=hurried, pivots=pivots))
            continue
        # One that takes care of several itself can't say that one of them has a point of no return.
        sagas = trees(hurried=hurried, names=names, depth=depth + 1, pivots=pivots and kind == "nested")
        below = [draw(sagas) for _ in range({"nested": 1, "several": 2, "replaced": draw(st.integers(0, 1))}[kind])]
        instead = [draw(sagas) for _ in range(draw(st.integers(1, 2)))] if kind == "replaced" else []
        stages[name] = Kin(below) if kind == "nested" else draw(several(below, instead))
    return Tree(f"p{mine[0]}", shape, stages, draw(policies(mine, hurried=hurried)))


@st.composite
def several(draw: st.DrawFn, below: list[Tree], instead: list[Tree]) -> Kin:
    fails = [] if not instead else ["raise", "fail", "raise", "fail"]
    return Kin(
        below,
        instead,
        at_once=draw(st.booleans()),
        asked=draw(st.booleans()),
        records=draw(st.booleans()),
        outcome=draw(st.sampled_from(["ok", "ok", "raise", "fail", "cancel", "skip", *fails])),
        times=draw(st.sampled_from([1, 2, 99])),
        goes_on=draw(st.booleans()),
        instead_fails=draw(st.sampled_from([0, 0, 0, 1, 99])) if instead else 0,
    )


@st.composite
def deeds(draw: st.DrawFn, root: Tree, *, hurried: bool) -> dict[str, Any]:
    """What is done with a saga that has come to rest."""
    what = draw(st.sampled_from(["resume", "forward", "compensate", "settle", "settle", "mend"]))
    deed: dict[str, Any] = {"what": what}
    if what in {"resume", "forward"}:
        deed["policy"] = draw(st.one_of(st.none(), st.none(), policies(list(root.shape), hurried=hurried)))
    if what == "settle":
        deed["verdict"] = draw(st.sampled_from(["undone", "kept", "retry"]))
        deed["which"] = draw(st.integers(0, 3))
    if what == "mend":
        deed["name"] = draw(st.sampled_from(sorted(root.leaves())))
    return deed | draw(mishaps(hurried=hurried))


@st.composite
def mishaps(draw: st.DrawFn, *, hurried: bool) -> dict[str, Any]:
    """After how many writes the process dies, when the caller is cancelled, and when which saga of the family is, by its id."""
    return {
        "kills": draw(st.one_of(st.just([]), st.just([]), st.lists(st.integers(0, 25), min_size=1, max_size=2))),
        "cancel_at": None if hurried else draw(st.one_of(st.none(), st.none(), st.sampled_from([0.5, 1.0, 1.5, 2.5, 3.0]))),
        "stops": ()
        if hurried
        else draw(st.one_of(st.just(()), st.just(()), st.tuples(st.sampled_from([0.2, 0.5, 1.5]), st.integers(0, 5)))),
    }


@st.composite
def lives(draw: st.DrawFn, *, hurried: bool = False) -> dict[str, Any]:
    root = draw(trees(hurried=hurried))
    return {
        "root": root,
        "birth": draw(mishaps(hurried=hurried)),
        "deeds": draw(st.lists(deeds(root, hurried=hurried), max_size=4)),
        "is_slow": not hurried and draw(st.booleans()),
        "home": draw(st.sampled_from(["forward", "back", "as told"])),
    }


# -- what it is kept in ----------------------------------------------------------------------------------------------


class Mortal:
    """A ledger that takes so many writes; for whoever goes on, its process was killed there."""

    left: float = float("inf")

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError("killed")

    async def create(self, *args: Any, **options: Any) -> Any:
        self._count()
        return await super().create(*args, **options)  # type: ignore[misc] # of the ledger that it is mixed with

    async def append(self, *args: Any, **options: Any) -> None:
        self._count()
        await super().append(*args, **options)  # type: ignore[misc] # of the ledger that it is mixed with


class MortalMemory(Mortal, MemoryLedger):
    pass


class MortalSlowDisk(Mortal, SlowDisk):
    pass


class MortalSQLite(Mortal, SQLiteLedger):
    pass


class InMemory:
    def __init__(self, *, is_slow: bool) -> None:
        self.ledger = MortalSlowDisk() if is_slow else MortalMemory()

    async def reopen(self) -> Any:
        for saga in self.ledger._sagas.values():
            saga.owner = None
        return self.ledger


class OnDisk:
    def __init__(self, folder: Path) -> None:
        self.file = SQLiteFile(folder / "ledger.db")
        self.ledger: Any = None

    async def reopen(self) -> Any:
        if self.ledger is not None:
            await self.ledger.close()
        self.file.pass_time(100)
        self.ledger = MortalSQLite(self.file.path, clock=lambda: time.time() + self.file.ahead)
        return self.ledger


# -- a life, and the oracle ------------------------------------------------------------------------------------------


class Life:
    """A family of sagas from its birth until it is at rest for good; after each deed its reports have to agree with the world."""

    def __init__(self, case: Mapping[str, Any], place: InMemory | OnDisk) -> None:
        self.case, self.place = case, place
        self.root: Tree = case["root"]
        self.leaves = self.root.leaves()
        self.kin = self.root.kin()
        self.world = FamilyWorld(self.root)
        given = [deed["policy"] for deed in case["deeds"] if deed.get("policy") is not None]
        self.world.in_no_order = may_fall_back(self.root, given)
        self.pipeline: Pipeline = self.root.pipeline(self.world)
        self.ledger: Any = None
        self.asked: Counter[str] = Counter()
        self.is_told_above = False

    async def live(self) -> None:
        await self.act(lambda saga: saga.run(self.pipeline, saga_id="s"), **self.case["birth"])
        if not await self.ledger.read("s"):
            # It died before anything was known of it.
            assert not self.world.log
            return
        await self.look()
        for deed in self.case["deeds"]:
            await self.do(**deed)
            await self.look()
        if self.case["home"] == "as told":
            await self.do_as_told()
        else:
            await self.come_home(self.case["home"])

    async def act(
        self,
        deed: Callable[[SagaCoordinator], Coroutine[Any, Any, Any]],
        *,
        kills: Sequence[int] = (),
        cancel_at: float | None = None,
        stops: tuple[float, int] | tuple[()] = (),
    ) -> bool:
        """Do something with a new coordinator, whose process may die; then others recover what it left. Whether it was refused."""
        refused = False
        for number, kill in enumerate([*kills, float("inf")]):
            self.ledger = await self.place.reopen()
            coordinator = SagaCoordinator(self.root.policy, ledger=self.ledger)
            self.ledger.left = kill
            self.world.unsure.clear()
            try:
                if number == 0:
                    refused = await self._attempt(coordinator, deed, cancel_at, stops)
                else:
                    await self._recover(coordinator)
            except (LedgerError, OSError):
                assert self.ledger.left < 0
            if self.ledger.left < 0:
                self.world.confirmed -= self.world.unsure
            elif number == 0:
                break
            self.ledger.left = float("inf")
        return refused

    async def _recover(self, coordinator: SagaCoordinator) -> None:
        recovery = await coordinator.recover(self.pipeline)
        if recovery.failed and self.ledger.left >= 0:
            # A stage that nothing can ask, or whose fallback does not go on with it, leaves what it ran to whoever has that one's pipeline,
            # when the saga above comes to rest.
            runners = [self.kin[tokens(saga_id)[-1]] for saga_id in recovery.failed]
            assert not any(kin.asked and not kin.instead for kin in runners), str(recovery)
            recovery = await coordinator.recover([tree.pipeline(self.world) for tree in self.root.family()])
        assert not recovery.held, str(recovery)
        assert not recovery.failed or self.ledger.left < 0, str(recovery)

    async def _attempt(
        self,
        coordinator: SagaCoordinator,
        deed: Callable[[SagaCoordinator], Coroutine[Any, Any, Any]],
        cancel_at: float | None,
        stops: tuple[float, int] | tuple[()],
    ) -> bool:
        before = await self.history()
        task = asyncio.ensure_future(deed(coordinator))
        stopping = asyncio.ensure_future(self._stop(coordinator, *stops)) if stops else None
        try:
            return await self._come_to_rest(coordinator, task, cancel_at, before)
        finally:
            if stopping is not None:
                await stopping

    async def _stop(self, coordinator: SagaCoordinator, at: float, which: int) -> None:
        """Cancel one of the sagas that are alive by then by its id."""
        await elapse(at)
        alive = sorted(saga_id for saga_id, saga in coordinator._keeper.held.sagas.items() if saga is not None)
        if alive:
            await coordinator.cancel(alive[which % len(alive)])

    async def _come_to_rest(
        self, coordinator: SagaCoordinator, task: asyncio.Future[Any], cancel_at: float | None, before: dict[str, int]
    ) -> bool:
        if cancel_at is not None:
            await elapse(cancel_at)
            task.cancel()
        try:
            report = await task
        except asyncio.CancelledError:
            assert cancel_at is not None
            return False
        except MisuseError as refusal:
            if not any(why in str(refusal) for why in ("in doubt, without a probe and not idempotent", "got retry")):
                raise
            assert await self.history() == before, "it was refused, and something was recorded"
            return True
        assert report == await coordinator.report("s")
        return False

    async def history(self) -> dict[str, int]:
        """How many events each saga has."""
        return {entry.saga_id: len(await self.ledger.read(entry.saga_id)) for entry in await self.ledger.list()}

    async def report(self) -> SagaReport:
        return await SagaCoordinator(ledger=self.ledger).report("s")

    async def do(self, what: str, **how: Any) -> None:
        mishaps = {"kills": how.get("kills", ()), "cancel_at": how.get("cancel_at"), "stops": how.get("stops", ())}
        match what:
            case "resume":
                await self.act(lambda saga: saga.resume("s", self.pipeline, policy=how["policy"]), **mishaps)
            case "forward":
                await self.act(lambda saga: saga.resume("s", self.pipeline, policy=how["policy"], forward=True), **mishaps)
            case "compensate":
                await self.act(lambda saga: saga.compensate("s", self.pipeline), **mishaps)
            case "mend":
                self.leaves[how["name"]].mend()
            case "settle":
                open_questions = unsettled(await self.report())
                if open_questions:
                    path = open_questions[how["which"] % len(open_questions)]
                    await self.settle(path, how["verdict"], kills=how["kills"])
                self.asked.clear()
            case _:
                raise AssertionError(what)

    async def settle(self, path: str, verdict: str, *, kills: Sequence[int] = ()) -> None:
        """Say the truth of a stage, having made it true where that takes a deed."""
        report, name = await self.report(), path.rpartition("/")[2]
        leaf = self.leaves.get(name)
        if leaf is None:
            # It runs others, none of which is in question: to look once more tells, or what stands of it.
            stands = self.world.within(*owner_of(report, path))
            verdict = "retry" if verdict == "retry" or not self.is_old(path) else "kept" if stands else "undone"
        else:
            stands = self.world.within(*owner_of(report, path))
            if verdict == "kept" and not stands:
                verdict = "undone"
            if verdict == "undone":
                for key in stands:
                    self.world.by_hand(key)
            if verdict == "retry":
                leaf.mend()
        assert path in {*report.stuck, *report.in_doubt}
        owner, stage = owner_of(report, path)
        may_say = stage_of_family(report, owner, stage).verdicts
        before = await self.history()
        refused = await self.act(lambda saga: saga.settle("s", path, verdict, "looked"), kills=kills)
        if not refused and await self.history() == before:
            # The process died with the word; whoever has put things right by hand says it once more.
            refused = await self.act(lambda saga: saga.settle("s", path, verdict, "looked"))
        # What the report offers is taken, and nothing else.
        assert refused is (verdict not in may_say), (path, verdict, may_say)
        if verdict == "kept" and not refused and leaf is None:
            # It holds for all that is within.
            self.world.serve(owner, stage, {"/".join(key.split("/")[: owner.count("/") + 2]) for key in stands})
        if refused and leaf is not None:
            assert verdict == "retry"
            await self.settle(path, "undone")

    def is_old(self, path: str) -> bool:
        """Whether a stage was in question already when it was asked for before."""
        self.asked[path] += 1
        return self.asked[path] > 1

    async def look(self) -> SagaReport:
        assert self.world.refusals == []
        report = await self.report()
        assert SagaReport.model_validate_json(report.model_dump_json()) == report
        seen = set(self.agrees(report))
        unseen = set(self.world.standing) - seen
        assert not unseen, f"nobody reports {unseen}"
        return report

    def agrees(self, report: SagaReport) -> Iterator[str]:
        """Compare a saga with the world; gives the keys of its effects that stand and that it shows."""
        assert report.status not in ALIVE, report.saga_id
        standing = self.world.within(report.saga_id)
        if report.status is SagaStatus.COMPENSATED:
            # Promise 5.
            assert not standing, f"{report.saga_id} is compensated"
            assert report.clean
        if report.status is SagaStatus.COMPLETED:
            assert self.is_clean(report)
            # One that skipped itself when an attempt before may have landed is undone.
            shown = {name: stage.state for name, stage in report.stages.items() if stage.skip_reason is None}
            assert {S.KEPT, S.FALLBACK}.issuperset(shown.values()), (report.saga_id, shown)
        if report.status is SagaStatus.DEGRADED:
            assert self.is_clean(report)
        if report.status is SagaStatus.STUCK:
            assert not report.clean
        for name, stage in report.stages.items():
            stands = self.world.within(report.saga_id, name)
            where = (report.saga_id, name, stage.state.value, report.status.value, stands)
            if name in self.leaves:
                self.leaf_agrees(report, name, stage, stands, where)
                yield from stands
            else:
                self.kin_agrees(report, name, stage, stands, where)
                for child in stage.children:
                    yield from self.agrees(child)

    def is_clean(self, report: SagaReport) -> bool:
        """Whether nothing is in question, but in what a fallback had run of a stage that then completed itself."""
        if report.clean:
            return True
        if any(stage.state in {S.STUCK, S.IN_DOUBT, S.BLOCKED} for stage in report.stages.values()):
            return False
        children = [(name, child) for name, stage in report.stages.items() for child in stage.children if not stage.is_kept_by_word]
        return all(self.is_clean(child) or self.is_passed_by(report.stages[name], child) for name, child in children)

    def is_passed_by(self, stage: StageReport, child: SagaReport) -> bool:
        return stage.state is S.KEPT and child.pipeline in {tree.name for tree in self.kin[str(child.parent_stage)].instead}

    def leaf_agrees(self, report: SagaReport, name: str, stage: StageReport, stands: list[str], where: Any) -> None:
        if self.leaves[name].kind == "plain":
            assert not stands
            return
        match stage.state:
            case S.KEPT:
                assert len(stands) == 1, where
            case S.STUCK | S.IN_DOUBT | S.BLOCKED:
                assert len(stands) <= 1, where
            case S.FALLBACK if stage.settled is not None and stage.settled.verdict == "kept":
                assert len(stands) == 1, where
            case S.FALLBACK if "pivot" in self.leaves[name].kind and stage.probed:
                # It had landed, as was learnt when its fallback stood in already; nobody can undo it.
                assert len(stands) == 1, where
                assert report.past_pivot, where
            case S.UNDONE | S.NOT_RUN:
                assert not stands, where
            case _:
                # A saga that keeps what was done keeps what a failed stage has recorded, too.
                kept_part = stage.effects and report.status in {SagaStatus.HALTED, SagaStatus.CANCELLED}
                assert not stands or kept_part, where

    def kin_agrees(self, report: SagaReport, name: str, stage: StageReport, stands: list[str], where: Any) -> None:
        kin = self.kin[name]
        own = [child for child in stage.children if child.pipeline in {tree.name for tree in kin.trees}]
        past_pivot = any(child.past_pivot for child in stage.children)
        if stage.settled is not None and stage.settled.verdict == "kept":
            # A person wants it as it is.
            return
        used = self.world.serving.get(f"{report.saga_id}/{name}", set())
        serving = [child for child in stage.children if child.saga_id in used]
        match stage.state:
            case S.KEPT:
                assert len(own) >= len(kin.trees), where
                left = [child for child in stage.children if not (child.ok or child.past_pivot) and self.world.within(child.saga_id)]
                assert all(self.is_passed_by(stage, child) for child in left), where
                if report.ok and own:
                    assert own[-1].ok, where
            case S.UNDONE | S.NOT_RUN:
                assert not stands, where
            case S.STUCK | S.IN_DOUBT | S.BLOCKED:
                pass
            case S.FALLBACK if serving:
                assert all(child.ok for child in serving), where
                others = [key for key in stands if not any(key.startswith(f"{saga_id}/") for saga_id in used)]
                assert not others or report.status in {SagaStatus.HALTED, SagaStatus.CANCELLED}, (where, others)
            case _:
                # A saga that keeps what was done keeps what sagas of a failed stage have done, too.
                kept_part = kin.at_once is not None and report.status in {SagaStatus.HALTED, SagaStatus.CANCELLED}
                assert not stands or past_pivot or kept_part, where

    async def come_home(self, way: str) -> None:
        """Mended and truthfully settled, every life comes to rest, and stays there: undone, or completed."""
        for stage in (*self.leaves.values(), *self.kin.values()):
            stage.mend()
        for _ in range(6):
            for asked in unsettled(await self.report()):
                # What is settled within may have answered for it.
                if asked in unsettled(await self.report()):
                    await self.settle(asked, "undone" if way == "back" else "kept")
            if way == "back":
                await self.act(lambda saga: saga.compensate("s", self.pipeline))
            else:
                await self.act(lambda saga: saga.resume("s", self.pipeline, policy=FailFast(), forward=True))
            report = await self.look()
            if self.is_clean(report) and (way == "back" or report.ok):
                break
            if report.past_pivot:
                # From there the way leads forward only.
                way = "forward"
        event(f"{way}: {report.status.value}")
        if not report.clean and self.is_clean(report):
            report = await self.as_told()
        assert report.clean, str(report)
        assert report.ok if way == "forward" else report.past_pivot or not self.world.standing, str(report)
        history = await self.history()
        if way == "back":
            await self.act(lambda saga: saga.compensate("s", self.pipeline))
        else:
            await self.act(lambda saga: saga.resume("s", self.pipeline))
        assert await self.history() == history, "there was nothing left to do"

    async def do_as_told(self) -> None:
        """Mended, and a person doing what the reports say, every life comes to where nothing is left to do."""
        for stage in (*self.leaves.values(), *self.kin.values()):
            stage.mend()
        report = await self.as_told()
        event(f"as told: {report.status.value}")
        if not self.is_told_above:
            await self.look()

    async def as_told(self) -> SagaReport:
        """Do what the reports say until nothing is left to do."""
        told: list[str] = []
        for _ in range(12):
            report = await self.report()
            if what_to_do(report)[-1] == "Nothing is left to do.":
                return report
            for command in commands_in(report):
                told.append(" ".join(command))
                await self.obey(*command)
        raise AssertionError("\n".join(told) + f"\n{report}")

    async def obey(self, name: str, saga_id: str, *words: str) -> None:
        """Carry out a command of a report, and put right by hand what is said to be undone."""
        if name == "settle":
            path, verdict, *_ = words
            report = await self.report()
            if path not in {*report.stuck, *report.in_doubt}:
                return  # what was said before it has answered for it
            if verdict == "undone":
                for key in self.world.within(*owner_of(report, path)):
                    self.world.by_hand(key)
                    # Of what the sagas within a stage did, their own ledgers are not told that it stands no more.
                    self.is_told_above = self.is_told_above or path.rpartition("/")[2] in self.kin
            refused = await self.act(lambda saga: saga.settle(saga_id, path, verdict, "looked"))
        else:
            pipelines = {tree.name: tree.pipeline(self.world) for tree in self.root.family()}
            [entry] = [entry for entry in await self.ledger.list() if entry.saga_id == saga_id]
            pipeline = self.pipeline if saga_id == "s" else pipelines[entry.pipeline]

            async def go_on(saga: SagaCoordinator) -> SagaReport:
                await (saga.resume if name == "resume" else saga.compensate)(saga_id, pipeline)
                return await saga.report("s")

            refused = await self.act(go_on)
        assert not refused, (name, saga_id, *words)


def commands_in(report: SagaReport) -> list[list[str]]:
    """The commands that a report of a saga at rest tells one to give, word by word."""
    commands = [shlex.split(found[0])[1:] for line in what_to_do(report) if (found := re.search(r"\bsaga .+", line))]
    assert commands, str(report)
    return commands


def owner_of(report: SagaReport, path: str) -> tuple[str, str]:
    """The newest saga that a path leads to, and its stage."""
    *above, name = path.split("/")
    for step in above:
        children = report.stages[stage_of(step)].children
        named = [child for child in children if child.saga_id == f"{report.saga_id}/{step}" and not child.clean]
        report = named[0] if named else children[-1]
    return report.saga_id, name


def stage_of_family(report: SagaReport, saga_id: str, stage: str) -> StageReport:
    """A stage of a saga, or of one within it."""
    if report.saga_id == saga_id:
        return report.stages[stage]
    children = [child for each in report.stages.values() for child in each.children]
    [child] = [child for child in children if saga_id == child.saga_id or saga_id.startswith(f"{child.saga_id}/")]
    return stage_of_family(child, saga_id, stage)


def stage_of(step: str) -> str:
    """The stage in a part of a path, which may tell several sagas of that stage apart: `a#1.2`."""
    return re.split("[~#]", step)[0]


def unsettled(report: SagaReport) -> list[str]:
    """The paths of what is stuck or in doubt, without those that are so because of something within them."""
    paths = [*report.stuck, *report.in_doubt]
    within = ["/".join(map(stage_of, path.split("/"))) for path in paths]
    return [path for path, bare in zip(paths, within, strict=True) if not any(other.startswith(f"{bare}/") for other in within)]


def left_behind() -> dict[str, Any]:
    """A saga that halts under a cancel and is killed while a stage of it, which has no probe, runs its second saga: found by drawing."""
    once = Retry(attempts=1, wait=0.0, jitter=False)
    settings: dict[str, Any] = {"retry": once, "compensation": Compensation(retry=once), "cancel_grace": 1000.0}
    within = ContinueWithFallback(**settings)
    children = [Tree(name, {leaf: ()}, {leaf: Leaf("compensable", "ok", after=after)}, within) for name, leaf, after in CHILDREN]
    stages: dict[str, Leaf | Kin] = {
        "a": Kin(children[:1]),
        "b": Leaf("compensable", "ok", after=1.0),
        "c": Kin(children[1:2]),
        "d": Kin(children[2:], at_once=False, asked=False, times=1),
    }
    root = Tree("pa", {"a": (), "b": (), "c": ("a", "b"), "d": ()}, stages, FailFast(on_interrupt="halt", **settings))
    return {"root": root, "birth": {"kills": [16], "cancel_at": 0.5}, "deeds": [], "is_slow": False, "home": "forward"}


CHILDREN = (("pe", "e", 0.0), ("pf", "f", 0.0), ("pg", "g", 0.0), ("ph", "h", 1.0))


def built_on_another() -> dict[str, Any]:
    """A fallback within has failed, and what its saga did could not be undone to the end; then its stage completes itself, and what depends
    on the one around it is built on that. What is left of the fallback's saga serves nothing, and is undone by itself: found by drawing.
    """
    once = Retry(attempts=1, wait=0.0, jitter=False)
    settings: dict[str, Any] = {"retry": once, "compensation": Compensation(retry=once), "cancel_grace": 1000.0}
    own = Tree("pf", {"f": ()}, {"f": Leaf()}, FailFast(**settings))
    other = Tree("pg", {"g": (), "h": ("g",)}, {"g": Leaf(), "h": Leaf(undo_fails=1)}, FailFast(**settings))
    fails_with_its_fallback = Kin([own], [other], at_once=False, asked=False, outcome="raise", times=1, instead_fails=1)
    within = Tree("pe", {"e": ()}, {"e": fails_with_its_fallback}, ContinueWithFallback(**settings))
    stages: dict[str, Leaf | Kin] = {"a": Kin([within]), "b": Leaf()}
    root = Tree("pa", {"a": (), "b": ("a",)}, stages, FailFast(on_failure="halt", **settings))
    return {"root": root, "birth": {}, "deeds": [], "is_slow": False, "home": "as told"}


@settings(max_examples=max(CASES // 8, 1), deadline=None, suppress_health_check=list(HealthCheck))
@given(lives())
@example(left_behind())
@example(built_on_another())
def test_what_is_promised_holds_for_a_family_of_sagas(case: Mapping[str, Any]) -> None:
    run(Life(case, InMemory(is_slow=case["is_slow"])).live())


@settings(max_examples=max(CASES // 200, 1), deadline=None, suppress_health_check=list(HealthCheck))
@given(lives(hurried=True))
def test_what_is_promised_holds_for_a_family_of_sagas_on_disk(case: Mapping[str, Any]) -> None:
    async def live(folder: str) -> None:
        place = OnDisk(Path(folder))
        try:
            await Life(case, place).live()
        finally:
            await place.ledger.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(folder))
