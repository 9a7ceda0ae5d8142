"""`saga` on the command line; it needs the extra `cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from saga.cli.exits import Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `saga` with these arguments, those of this process by default.

    Raises:
        SystemExit: Always; its code is an `Exit`.
    """
    try:
        from saga.cli.commands import app  # noqa: PLC0415 - typer and rich are there or not
    except ModuleNotFoundError as missing:
        if missing.name not in {"typer", "rich"}:
            raise
        sys.stderr.write(f"saga: the command line needs {missing.name}. Install it with: pip install 'stageflow-saga[cli]'\n")
        sys.exit(Exit.MISUSE)
    with suppress(AttributeError):  # whoever calls from Python may have put anything there
        # What the locale has no letter for is escaped, as on stderr: an error would end `saga run` without the report of what it did.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # of a stream to the outside
    app(arguments, prog_name="saga")
