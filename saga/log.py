"""The logger `saga`: what a saga has to say for itself, besides what its listeners are told."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, Final


class _Log(logging.LoggerAdapter[logging.Logger]):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log it; a handler or a filter that fails goes to stderr, as the standard library's own do, and harms no saga."""
        try:
            super().log(level, msg, *args, **{"stacklevel": 2} | kwargs)
        except Exception:  # noqa: BLE001 - whatever a handler raises; also the standard library's own, where stderr was closed
            with suppress(Exception):
                logging.Handler().handleError(logging.makeLogRecord({"msg": msg, "args": args}))


LOG: Final = _Log(logging.getLogger("saga"))
