"""A process without any rights that reads a saga of a ledger and then appends to it, and says what came of it: `reading.py PATH`."""

from __future__ import annotations

import os
import sys

from saga.ledgers.sqlite import SQLiteLedger
from tests.test_ledger_contract import FIRST, append, on, read

NOBODY = 65534

if __name__ == "__main__":
    if os.geteuid() == 0:
        os.setuid(NOBODY)
    for answer in on(SQLiteLedger(sys.argv[1]), read(), append(FIRST, version=4)):
        print(len(answer) if isinstance(answer, tuple) else answer)
