"""The commands of `saga` that come next, to be copied and run."""

from __future__ import annotations

from typing import Final, NamedTuple

from saga.text import quoted

TARGET: Final = "MODULE:PIPELINE"
"""How a command is told a pipeline, where it isn't known which."""


class Reach(NamedTuple):
    """How the next command of `saga` gets at a saga.

    Attributes:
        pipeline: MODULE:PIPELINE, for the commands that run its code; empty where they find it by themselves.
        options: What every command is given, quoted.
        is_lost: No command will: its ledger ends with this process.
    """

    pipeline: str = ""
    options: str = ""
    is_lost: bool = False

    @property
    def to_another(self) -> Reach:
        """The same, but to a saga of another pipeline."""
        return self._replace(pipeline=TARGET if self.pipeline else "")


BY_ITSELF: Final = Reach()
"""By the settings and the environment alone."""


def next_command(name: str, *words: str, options: str = "") -> str:
    """A command of `saga` to be copied and run; its options as they are, its words quoted."""
    given = " ".join(map(quoted, words))
    # What begins with a dash would be taken for an option, were it not said that no more of them follow.
    parts = (name, options, "--", given) if any(word.startswith("-") for word in words) else (name, given, options)
    return " ".join(("saga", *filter(None, parts)))


def command_for(name: str, saga_id: str, reach: Reach) -> str:
    """A command that runs the code of a saga's pipeline."""
    return next_command(name, saga_id, *filter(None, [reach.pipeline]), options=reach.options)


def recover_command(reach: Reach) -> str:
    """The command that goes on with all whose process is gone."""
    return next_command("recover", *filter(None, [reach.pipeline]), options=reach.options)
