"""A process that uses a ledger, forks, and uses it on both sides: `forking.py PATH`."""

from __future__ import annotations

import asyncio
import os
import sys

from saga.ledgers.sqlite import SQLiteLedger
from tests.test_ledger_contract import create

if __name__ == "__main__":
    ledger = SQLiteLedger(sys.argv[1])
    asyncio.run(create("before")(ledger))
    child = os.fork()
    if child and os.waitpid(child, 0)[1]:
        sys.exit("the child failed")
    asyncio.run(create("parent" if child else "child")(ledger))
    asyncio.run(ledger.close())
