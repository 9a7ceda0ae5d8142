"""A process that appends to several sagas at once and says what was acknowledged: `appending.py PATH [HOW OFTEN [PREFIX [close]]]`.

Where it isn't told how often, it does so forever; it closes its ledger only where it is told to.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import count, islice

from saga import FailFast
from saga.events import SagaStarted, StageStarted
from saga.graph import Graph
from saga.ledgers.sqlite import SQLiteLedger

SAGAS = "abcd"
AT_ONCE = 3


async def _append(ledger: SQLiteLedger, saga_id: str, how_often: int | None) -> None:
    await ledger.create(saga_id, "me", (SagaStarted(saga_id=saga_id, pipeline="p", graph=Graph(nodes=()), policy=FailFast()),))
    for version in islice(count(1, AT_ONCE), how_often):
        events = [StageStarted(stage="a", attempt=version + number) for number in range(AT_ONCE)]
        await ledger.append(saga_id, events, expected_version=version, token=1)
        print(saga_id, version + AT_ONCE, flush=True)


async def _main(path: str, how_often: str = "", prefix: str = "", close: str = "") -> None:
    ledger = SQLiteLedger(path, lease=180.0, patience=60.0)  # others may be stopped in the middle of a write
    await asyncio.gather(*(_append(ledger, prefix + saga_id, int(how_often) if how_often else None) for saga_id in SAGAS))
    if close:
        await ledger.close()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
