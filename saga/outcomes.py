"""What the code of a stage came to: what it returned, sorted into an output or a failure."""

from __future__ import annotations

from dataclasses import dataclass
from types import CoroutineType
from typing import Final, Self

from stageflow.api import StageOutput, StageStatus

from saga.failures import Failure, FailureKind
from saga.outputs import copied_output
from saga.quick import members
from saga.text import glimpse, reason_in, said

_STATUS: Final = members(StageStatus)
_EMPTY: Final = StageOutput.ok()
"""What a stage gives that returns None: to copy it takes a quarter of the time that it takes to make another one."""


@dataclass(slots=True)
class Outcome:
    """What one attempt came to.

    Attributes:
        output: What the stage returned.
        failure: How it failed; None if it did not.
    """

    output: StageOutput | None = None
    failure: Failure | None = None

    def is_well(self) -> bool:
        """Whether it has not failed, and gave an output, so that its effect is taken to have landed."""
        return self.failure is None and self.output is not None and self.output.status is _STATUS.OK

    @classmethod
    def of(cls, stage: str, attempt: int, returned: object) -> Self:
        """Sort what an attempt of a stage returned."""
        match returned:
            case None:
                return cls(copied_output(_EMPTY))
            case dict():
                return cls(StageOutput.ok(returned))
            case StageOutput(data=dict(), status=StageStatus()):
                return cls(returned, _failure_in(stage, attempt, returned))
            case StageOutput(data=data, status=StageStatus()):
                return cls(failure=_broken_contract(stage, attempt, f"StageOutput(data={glimpse(data)})", type(data)))
            case _:
                return cls(failure=_broken_contract(stage, attempt, glimpse(returned), type(returned)))


def _broken_contract(stage: str, attempt: int, got: str, kind: type) -> Failure:
    hint = ". Write await before its call" if issubclass(kind, CoroutineType) else ""
    message = f"expected a StageOutput with a dict as data, a dict or None, got {got}{hint}"
    return Failure.of(stage, FailureKind.CONTRACT, message, type=kind.__qualname__, attempt=attempt)


def _failure_in(stage: str, attempt: int, output: StageOutput) -> Failure | None:
    """What an output says that failed, if it does."""
    kind = FailureKind.CONTRACT
    match output.status:
        case _STATUS.OK | _STATUS.SKIP:
            return None
        case _STATUS.CANCEL:
            kind, message = FailureKind.CANCELLED, reason_in(output.data.get("cancel_reason"), "no reason given")
        case _STATUS.FAIL:
            kind, message = FailureKind.REPORTED, reason_in(output.error, "no error given")
        case _:
            message = f"it asked for a retry and no attempt is left: {said(output.error)}"
    return Failure.of(stage, kind, message, type=output.status.value, attempt=attempt)
