"""How a saga behaves when something fails: frozen, validated, storable.

This is the only file that knows tenacity: it decides whether and when another attempt is made, and the
saga makes it, because between two attempts a probe may be asked and a ledger written.
"""

from __future__ import annotations

import difflib
import inspect
import json
import sys
import tomllib
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final, Literal, Self, TypeGuard

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from tenacity import BaseRetrying, RetryCallState, wait_exponential, wait_random_exponential

from saga.errors import PolicyInvalid
from saga.failures import Failure, FailureKind
from saga.outputs import Plain
from saga.text import did_you_mean, qualified

# Strict, or True would be one second.
Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]

_NEVER_RETRIED: Final = frozenset({FailureKind.CANCELLED, FailureKind.INTERRUPTED, FailureKind.CONTRACT})
# In which ways one attempt fails; what ran in a process that is gone is `resume`'s to repeat.
_RETRIED: Final = tuple(kind.value for kind in FailureKind if kind not in {*_NEVER_RETRIED, FailureKind.CRASHED, FailureKind.LATE})


class _OfType(str):
    """The name of an exception that was given itself: that is meant, whatever its module has under that name."""

    __slots__ = ()


def _names(value: Any, info: ValidationInfo) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        value = (value,)
    names: list[str] = []
    for item in value:
        if _is_exception(item):
            names.append(_OfType(qualified(item)))
        elif isinstance(item, _OfType):
            names.append(item)
        elif isinstance(item, str) and item:
            _refuse_no_kind(str(item), info)
            names.append(str(item))
        else:
            raise ValueError("expected failure kinds, exception types or their qualified names")
    return tuple(sorted(set(names)))


def _refuse_no_kind(name: str, info: ValidationInfo) -> None:
    # Of no failure that may be tried again: it would match nothing, and nobody would notice.
    if name in (set(FailureKind) if _is_recorded(info) else _RETRIED):
        return
    if "." in name or not name.islower():
        # Another Python may have recorded the name of an exception that this one lacks.
        if not _is_recorded(info):
            _refuse_no_exception(name, _place(info))
        return
    wanted = f"one of {', '.join(_RETRIED)}, or the name of an exception"
    raise PolicyInvalid(f"{wanted} for Retry.retry_on{_place(info)}", got=repr(name), hint=did_you_mean(name, _RETRIED))


def _refuse_no_exception(name: str, place: str) -> None:
    module, _, last = name.rpartition(".")
    known = _of_module(module or "builtins")
    if module == "__main__" or known is None or "__getattr__" in known or _is_being_loaded(known) or _is_exception(known.get(last)):
        return  # it, or what would know it, may be loaded later
    near = difflib.get_close_matches(last, [each for each, value in known.items() if _is_exception(value)], n=1, cutoff=0.8)
    hint = f"Did you mean {f'{module}.{near[0]}'.lstrip('.')!r}?" if near else ""
    if not module:
        wanted = f"an exception of Python's own, or one with its module, for Retry.retry_on{place}"
        raise PolicyInvalid(wanted, got=repr(name), hint=hint or f"As in payments.{name}.")
    if near or module.partition(".")[0] in sys.stdlib_module_names:
        # What Python's own modules lack does not exist; others make exceptions that only the class that made them has.
        raise PolicyInvalid(f"an exception of {module} for Retry.retry_on{place}", got=repr(name), hint=hint)


def _meant(name: str) -> str:
    """The name that an exception has itself: many are known under that of another module."""
    module, _, last = name.rpartition(".")
    kind = (_of_module(module or "builtins") or {}).get(last)
    return qualified(kind) if _is_exception(kind) else name


def _may_be_of_a_script(kind: type) -> bool:
    """Whether a type may be what `__main__` had when the policy was recorded: who goes on with the saga has imported that script."""
    own = _of_module("__main__") or {}
    return kind.__module__ != "builtins" and not _is_exception(own.get(kind.__qualname__))


def _of_module(name: str) -> Mapping[str, Any] | None:
    """What a module has; None if nobody has imported it, which what data names is not, or if what stands in for it has its own ways."""
    module = sys.modules.get(name)
    return vars(module) if type(module) is ModuleType else None


def _is_being_loaded(module: Mapping[str, Any]) -> bool:
    return getattr(module.get("__spec__"), "_initializing", False)


def _is_exception(value: object) -> TypeGuard[type[BaseException]]:
    return isinstance(value, type) and issubclass(value, BaseException)


class _Frozen(BaseModel):
    """A frozen model whose mistakes read "expected ..., got ..."."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise _invalid(cls, error, _place(info)) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, in which what is updated is checked as in a new one: pydantic would take whatever it is given.

        Raises:
            PolicyInvalid: It can't be so, or there is no such key.
        """
        copied = super().model_copy(deep=deep)
        if not update:
            return copied
        return type(self).model_validate({name: getattr(copied, name) for name in copied.model_fields_set} | dict(update))


def _invalid(model: type[BaseModel], error: ValidationError, place: str) -> PolicyInvalid:
    first = error.errors(include_url=False)[0]
    key, keys = ".".join(str(part) for part in first["loc"]), ", ".join(model.model_fields)
    if first["type"] == "extra_forbidden":
        return PolicyInvalid(f"one of {keys} in {model.__name__}{place}", got=repr(key), hint=did_you_mean(key, model.model_fields))
    if not key:
        return PolicyInvalid(f"a {model.__name__} or a table of its keys ({keys}){place}", got=repr(first["input"]))
    wanted = str(first["msg"]).removeprefix("Input should be ").removeprefix("Value error, expected ")
    return PolicyInvalid(f"{wanted} for {model.__name__}.{key}{place}", got=repr(first["input"]))


def _place(info: ValidationInfo) -> str:
    """Name the file that is being read, if it is one."""
    return f", in {info.context}" if info.context is not None else ""


def _is_recorded(info: ValidationInfo) -> bool:
    """Whether it comes out of a ledger: what was once recorded has to be read for ever, whatever is refused by now."""
    return info.mode == "json" and info.context is None


class Retry(_Frozen):
    """How patiently one action is attempted.

    Attributes:
        attempts: Executions in total, the first included; at least 1. It has to be given where any of the others is.
        wait: Seconds before the second attempt; grows by `multiplier` up to `wait_max`.
        multiplier: What the wait is multiplied with after each attempt; at least 1.
        wait_max: Seconds; no wait is longer, not even the first.
        jitter: Full jitter: the wait before attempt n + 1 is uniform in
            [0, min(wait_max, wait * multiplier**(n - 1))]; without it, the wait is the upper end.
        max_elapsed: Seconds since the first attempt began; after them no further attempt starts.
        retry_on: Which failures are worth another attempt: `FailureKind`s, exception types (a subclass counts) or their
            qualified names; running out of time counts as having raised a `TimeoutError`. None: all but cancellation, interruption and a
            broken contract. After a timeout, or when the process died, nobody knows whether the effect landed: a probe, where there is
            one, is asked first. A stage that raised counts as without effect, and runs again unasked. In whatever way a compensation or a
            probe fails, its kind is `compensation`.

    Source: Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """

    attempts: Count = 1
    wait: NonNegative = 0.1
    multiplier: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)] = 2.0
    wait_max: NonNegative = 30.0
    jitter: bool = True
    max_elapsed: Seconds | None = None
    retry_on: Annotated[
        Collection[FailureKind | type[BaseException] | str] | None,
        PlainValidator(_names),
        PlainSerializer(lambda names: names if names is None else tuple(map(str, names))),
        WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
    ] = None

    @model_validator(mode="after")
    def _refuse_what_is_never_heeded(self, info: ValidationInfo) -> Self:
        if self.model_fields_set and "attempts" not in self.model_fields_set:
            hint = "Without it there is one attempt, whatever else is said of others."
            raise PolicyInvalid(f"attempts in Retry{_place(info)}", got=f"{', '.join(sorted(self.model_fields_set))} alone", hint=hint)
        if "wait_max" not in self.model_fields_set and self.wait > self.wait_max:
            raise PolicyInvalid(f"at least wait, {self.wait:g}, for Retry.wait_max{_place(info)}", got=f"{self.wait_max:g}")
        return self

    def is_worth(self, failure: Failure) -> bool:
        """Whether this failure is one that another attempt may mend."""
        if failure.kind in _NEVER_RETRIED:
            return False
        if self.retry_on is None:
            return True
        # What ran out of time has raised nothing, and is a TimeoutError to whoever asked for the timeout.
        raised = TimeoutError if failure.kind is FailureKind.TIMEOUT else type(failure.exception)
        names = {failure.kind.value, failure.type, *map(qualified, raised.__mro__)}
        names |= {f"__main__.{kind.__qualname__}" for kind in raised.__mro__ if _may_be_of_a_script(kind)}
        # As it is written, too: what was given as a type is meant itself, whatever its module has under that name.
        return not names.isdisjoint({*self.retry_on, *(_meant(str(name)) for name in self.retry_on)})

    def wait_before_next(self, failure: Failure, *, attempt: int, elapsed: float, asked: bool = False) -> float | None:
        """Seconds to wait after this failed attempt, or None when it was the last.

        Args:
            failure: How the attempt failed.
            attempt: Its number; 1 is the first.
            elapsed: Seconds since the first attempt began.
            asked: The stage itself asked for another attempt, whatever `retry_on` says.
        """
        if attempt >= self.attempts or not (asked or self.is_worth(failure)):
            return None
        wait = self._wait_after(attempt)
        if self.max_elapsed is not None and elapsed + wait > self.max_elapsed:
            return None
        return wait

    def _wait_after(self, attempt: int) -> float:
        if not self.wait:
            # After a thousand attempts or so tenacity's power overflows, and would be taken for the longest wait.
            return 0.0
        kind = wait_random_exponential if self.jitter else wait_exponential
        call = RetryCallState(retry_object=None, fn=None, args=(), kwargs={})  # type: ignore[arg-type] # waits read only the number
        call.attempt_number = attempt
        return kind(multiplier=self.wait, exp_base=self.multiplier, max=self.wait_max)(call)


def declared(by: Any, part: str) -> Any:
    """What a callable or a stage says of itself under that name; None: nothing. A partial one says what the whole one does.

    tenacity's decorator leaves a `retry` of its own on the function that it wraps, and functools hands that on to what wraps it:
    it says nothing to a saga.
    """
    value = getattr(by, part, None)
    if value is None:
        return declared(by.func, part) if isinstance(by, partial) else None
    return None if isinstance(value, BaseRetrying) and inspect.isroutine(inspect.unwrap(by)) else value


class Compensation(_Frozen):
    """How effects are undone.

    Attributes:
        retry: How often one compensation, or one probe, is attempted. Its counters are its own.
        timeout: Seconds for one attempt; None: no limit.
        max_concurrency: How many compensations run at once; None: no limit. With 1 the order is the reverse of the order in which the
            stages started, within the dependency order: deterministic.
        on_failure: What a compensation that failed for good holds back. `isolate`: the stages it depends on;
            independent branches are undone to the end. `continue`: nothing; everything that can be undone is, even
            under an effect that still stands. `halt`: everything that hasn't started.
        deadline: Seconds for the whole backward run; after them no further compensation starts.
    """

    retry: Retry = Retry(attempts=3)
    timeout: Seconds | None = 60.0
    max_concurrency: Count | None = None
    on_failure: Literal["isolate", "continue", "halt"] = "isolate"
    deadline: Seconds | None = None

    @model_validator(mode="after")
    def _refuse_kinds_of_stages(self, info: ValidationInfo) -> Self:
        kinds = set(self.retry.retry_on or ()) & set(_RETRIED) - {FailureKind.COMPENSATION.value}
        if kinds and not _is_recorded(info):
            expected = f"the kind compensation, or exceptions, for Compensation.retry.retry_on{_place(info)}"
            hint = "It is of that kind in whatever way a compensation fails; one that runs out of time is a TimeoutError."
            raise PolicyInvalid(expected, got=", ".join(sorted(map(repr, kinds))), hint=hint)
        return self


class _Policy(_Frozen):
    retry: Retry = Retry()
    timeout: Seconds | None = None
    compensation: Compensation = Compensation()
    in_flight: Literal["drain", "cancel"] = "drain"
    drain_timeout: Seconds | None = 30.0
    cancel_grace: Seconds = 5.0
    on_failure: Literal["compensate", "halt"] = "compensate"
    on_cancel: Literal["keep", "compensate"] = "keep"
    on_interrupt: Literal["compensate", "halt"] = "compensate"
    deadline: Seconds | None = None


class FailFast(_Policy):
    """A failure stops the saga: no new stage starts, the running ones end, then what took effect is undone.

    Attributes:
        retry: How often a stage is attempted, unless it says otherwise itself.
        timeout: Seconds for one attempt of a stage, unless it says otherwise itself; None: no limit.
        compensation: How effects are undone.
        in_flight: What happens to running stages once the saga stops: `drain` lets them end, `cancel` cancels all but pivots, whose outcome
            decides what may be undone.
        drain_timeout: Seconds that those left to end get before they are cancelled, too; None: as long as they take.
        cancel_grace: Seconds that a cancelled stage or compensation gets to end; after them it is given up as in doubt, or stuck.
        on_failure: `compensate` undoes, `halt` keeps everything for a later redrive.
        on_cancel: What a stage that returned CANCEL leads to: `keep` its predecessors' effects, or `compensate` them.
        on_interrupt: What a cancelled caller leads to: `compensate`, or `halt`.
        deadline: Seconds for the forward run; after them running stages are cancelled and the saga has failed.
    """

    policy: Literal["fail_fast"] = "fail_fast"


class ContinueWithFallback(_Policy):
    """A failed stage's fallback becomes its output and the saga goes on.

    The fallback is what the stage's own `fallback()` gives; where it has none, or that fails, too, the entry in `fallbacks`. All that
    `FailFast` has applies to a failure that no fallback absorbs.

    Attributes:
        fallbacks: Output data by stage name, used when that stage has failed, and so has its own `fallback()`, if it has one.
        without_fallback: What a failure without a fallback does: `fail` as in `FailFast`; `skip_branch` skips what
            depends on it and lets the other branches go on.
        orphans: At the end of a saga that skipped a branch, what happens to completed stages that now serve nothing kept:
            `compensate` or `keep` them; a saga that keeps nothing else is halted.
    """

    policy: Literal["continue_with_fallback"] = "continue_with_fallback"
    fallbacks: dict[str, dict[str, Plain]] = Field(default_factory=dict)
    without_fallback: Literal["fail", "skip_branch"] = "fail"
    orphans: Literal["compensate", "keep"] = "compensate"


Policy = Annotated[FailFast | ContinueWithFallback, Discriminator("policy")]


@cache
def _reader() -> TypeAdapter[FailFast | ContinueWithFallback]:
    return TypeAdapter(Policy)


def load_policy(path: str | Path) -> FailFast | ContinueWithFallback:
    """Read a policy from a `.toml` or a `.json` file; its key `policy` says which one it is.

    Raises:
        PolicyInvalid: The file holds no policy; the error names the file.
        OSError: It can't be read.
    """
    path = Path(path)
    content = path.read_bytes()
    if path.suffix not in {".toml", ".json"}:
        raise PolicyInvalid("a .toml or .json file", got=path.name)
    try:
        text = content.decode("utf-8")
        if path.suffix == ".toml":
            return _reader().validate_python(tomllib.loads(text), context=path.name)
        return _reader().validate_json(_without_schema(text), context=path.name)
    except UnicodeDecodeError as error:
        raise PolicyInvalid(f"UTF-8 in {path.name}", got=f"{content[error.start]:#x} at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise PolicyInvalid(f"TOML in {path.name}", got=str(error)) from None
    except RecursionError:
        # tomllib calls itself for each level.
        raise PolicyInvalid(f"TOML in {path.name}", got="values that are nested too deeply") from None
    except ValidationError as error:
        raise _no_policy(path.name, error) from None


def _without_schema(text: str) -> str:
    """The JSON of a policy without the key by which an editor finds its schema."""
    with suppress(ValueError, RecursionError):  # whoever reads it says what is wrong
        document = json.loads(text)
        if isinstance(document, dict) and document.pop("$schema", None) is not None:
            return json.dumps(document)
    return text


def _no_policy(name: str, error: ValidationError) -> PolicyInvalid:
    first = error.errors(include_url=False)[0]
    told = first.get("ctx", {})
    if first["type"] == "json_invalid":
        return PolicyInvalid(f"JSON in {name}", got=told["error"])
    # Keys of the policies themselves are refused by their models; here only the choice between them can be wrong.
    got = repr(told["tag"]) if "tag" in told else "no key policy"
    return PolicyInvalid(f"policy = 'fail_fast' or 'continue_with_fallback', in {name}", got=got)
