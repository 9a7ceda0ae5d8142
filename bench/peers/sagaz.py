"""sagaz, the saga library that we compare ourselves with. Optional; nothing else imports it.

Its documented use: `Saga(name=...)`, `add_step(...)`, `await saga.run({})`, with its storage in memory. One saga is built
once and run again and again, which it allows one at a time and which is faster than building it for each run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.peers.turns import WORLD, Fifth, Run, serve
from bench.workloads import Failing, MeasurementError, Stamps

if TYPE_CHECKING:
    from bench.workloads import Shape


class Sagaz:
    """The library, imported.

    Attributes:
        version: Its version.
    """

    def __init__(self, module: Any) -> None:
        """Take the imported module."""
        self._module = module
        self.version = importlib.metadata.version("sagaz")

    @classmethod
    def find(cls) -> Self | None:
        """Import it; None when it is not installed."""
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        try:
            return cls(importlib.import_module("sagaz"))
        except ImportError:
            return None
        finally:
            # One of its examples, which it imports, has the root logger write INFO to the terminal; whatever is measured
            # from then on would pay for that.
            root.handlers[:] = handlers
            root.setLevel(level)

    def build(self, shape: Shape, stamps: Stamps | None, *, listeners: bool) -> Any:
        """Build a saga of that shape; with stamps, its last step fails.

        Args:
            shape: Its steps.
            stamps: Where the rollback is noted; None: every step does nothing and succeeds.
            listeners: Whether to leave its default listeners on, for metrics and the log.
        """
        saga = self._new(listeners=listeners)
        last = list(shape)[-1]

        async def action(_ctx: dict[str, Any]) -> None:
            """Do nothing."""

        async def failing(_ctx: dict[str, Any]) -> None:
            assert stamps is not None  # the last step fails only when it is noted
            stamps.fail()

        async def compensation(_ctx: dict[str, Any]) -> None:
            if stamps is not None:
                stamps.compensated()

        for name, dependencies in shape.items():
            fails = stamps is not None and name == last
            saga.add_step(name, failing if fails else action, compensation, depends_on=list(dependencies))
        return saga

    def five(self, *, fails: bool) -> Any:
        """Build a chain of five that counts what it does; the last may fail. Its listeners are off, which is faster."""
        saga = self._new(listeners=False)

        async def step(_ctx: dict[str, Any]) -> None:
            WORLD.done += 1

        async def failing(_ctx: dict[str, Any]) -> None:
            raise Fifth

        async def undo(_ctx: dict[str, Any]) -> None:
            WORLD.undone += 1

        for number in range(5):
            depends_on = [f"step_{number - 1}"] if number else []
            saga.add_step(f"step_{number}", failing if fails and number == 4 else step, undo, depends_on=depends_on)
        return saga

    def _new(self, *, listeners: bool) -> Any:
        return self._module.Saga(name="bench", config=self._module.SagaConfig(metrics=listeners, logging=listeners))


class SagazSaga:
    """One sagaz saga, run again and again, or built anew for each run, as those have to be that run at once: one object has one id."""

    def __init__(self, sagaz: Sagaz, shape: Shape, stamps: Stamps | None = None, *, listeners: bool = True, anew: bool = False) -> None:
        """Take what `Sagaz.build` takes, and whether to build it for each run."""
        self._sagaz = sagaz
        self._shape = shape
        self._stamps = stamps
        self._listeners = listeners
        self._anew = anew
        self._saga: Any = None

    async def prepare(self) -> None:
        """Build it anew, so that its storage does not grow from round to round."""
        self._saga = self._sagaz.build(self._shape, self._stamps, listeners=self._listeners)
        await self.run()

    async def run(self) -> None:
        """Run it once."""
        if self._anew:
            self._saga = self._sagaz.build(self._shape, self._stamps, listeners=self._listeners)
        try:
            await self._saga.run({})
        except Failing:
            if self._stamps is None:
                raise
        else:
            if self._stamps is not None:
                raise MeasurementError("expected sagaz to pass the failure on, got none")


@asynccontextmanager
async def sagaz(_directory: Path, _dsn: str) -> AsyncIterator[Run]:
    """Run sagas in memory, one of its objects for each that runs at once; they are built when they are first needed."""
    library = Sagaz.find()
    if library is None:
        raise MeasurementError("sagaz is not installed (pip install sagaz==1.5.0)")
    idle: dict[bool, list[Any]] = {False: [], True: []}

    async def run(fails: bool) -> None:
        one = idle[fails].pop() if idle[fails] else library.five(fails=fails)
        try:
            await one.run({})
        except Fifth:
            if not fails:
                raise
        finally:
            idle[fails].append(one)

    yield run


if __name__ == "__main__":
    serve(sagaz, "sagaz")
