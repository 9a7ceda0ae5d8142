"""Durable ledgers: `saga.ledgers.sqlite.SQLiteLedger` and `saga.ledgers.postgres.PostgresLedger`.

Each is imported from its own file, because each needs something that not everybody has; `open_ledger` does that by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saga.errors import MisuseError
from saga.ledger import MemoryLedger

if TYPE_CHECKING:
    from saga.ledgers.postgres import PostgresLedger
    from saga.ledgers.sqlite import SQLiteLedger


def open_ledger(url: str, *, exists: bool = False) -> MemoryLedger | SQLiteLedger | PostgresLedger:
    """The ledger at a URL: `memory:`, `sqlite:///path/to/file` (with four slashes from the root, without options) or `postgresql://...`.

    `async with open_ledger(url) as ledger:` closes it at the end.

    Args:
        url: The URL.
        exists: The ledger is there already: where none is, none is made. A missing file is refused at once, a missing schema when used.

    Raises:
        MisuseError: It is no such URL, or there is no such file.
        ModuleNotFoundError: The ledger's driver is not installed; the message says how to get it.
    """
    expected = "a ledger's URL: memory:, sqlite:///path or postgresql://..."
    if not isinstance(url, str):
        # As a variable of the environment that is not set.
        raise MisuseError(expected, got=f"a {type(url).__name__}")
    scheme, colon, rest = url.partition(":")
    if url == "memory:":
        return MemoryLedger()
    if scheme == "sqlite" and rest.startswith("///") and rest != "///":
        if "?" in rest or rest != rest.strip():
            # It would be another file, beside the one with the sagas.
            hint = "SQLiteLedger(...) takes any path."
            raise MisuseError("a path without options, and without spaces around it, behind sqlite:///", got="one with them", hint=hint)
        from saga.ledgers.sqlite import SQLiteLedger  # noqa: PLC0415 - see above

        ledger = SQLiteLedger(rest.removeprefix("///"))
        if exists and not ledger.path.exists():
            raise MisuseError("a ledger that is there", got=f"{url}, and there is no file {ledger.path}")
        return ledger
    if scheme in {"postgresql", "postgres"} and rest.startswith("//"):
        from saga.ledgers.postgres import PostgresLedger  # noqa: PLC0415 - see above

        return PostgresLedger(url, exists=exists)
    # Not all of it is shown: it may hold a password.
    if not {"=", "@"}.isdisjoint(scheme):
        raise MisuseError(expected, got="one without a scheme", hint="PostgresLedger(...) takes a connection string of libpq, too.")
    hint = "Three slashes for a path from here, sqlite:///sagas.db; four from the root." if scheme == "sqlite" else ""
    raise MisuseError(expected, got=repr(scheme + colon), hint=hint)
