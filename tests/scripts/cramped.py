"""Makes a ledger in a folder with a little more room each time, and once more when there is enough: `cramped.py FOLDER BYTES`.

It says what the ledger holds then.
"""

from __future__ import annotations

import sys
from pathlib import Path

from saga.ledgers.sqlite import SQLiteLedger
from tests.test_ledger_contract import create, listed, on


def _try(folder: Path, in_the_way: int) -> None:
    path, filler = folder / "sagas.db", folder / "filler"
    filler.write_bytes(bytes(in_the_way))
    on(SQLiteLedger(path), create())
    filler.unlink()
    print(*on(SQLiteLedger(path), create(), listed())[1:])
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    for room in range(0, int(sys.argv[2]), 4096):
        _try(Path(sys.argv[1]), int(sys.argv[2]) - room)
