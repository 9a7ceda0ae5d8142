"""What Python is slow at, done quickly: to make a frozen dataclass or model, to read a member of an enumeration.

The constructor that dataclasses give a frozen class calls `object.__setattr__` for each field, at ten times the cost of storing it. A saga
of five stages sets some 220 fields of ours: an eighth of its instructions went into that. What a class is called with by name, Python
packs into a dict and takes out of it again, which takes as long as all of the constructor. Until Python 3.12 an enumeration has a hook for
attributes that it lacks, and whoever reads a member pays for it, fifty times what another attribute costs: a twentieth of a rollback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from functools import update_wrapper
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast, dataclass_transform

if TYPE_CHECKING:
    from pydantic import BaseModel

T = TypeVar("T")
M = TypeVar("M", bound="BaseModel")
E = TypeVar("E", bound=Enum)


def members(kind: type[E]) -> type[E]:
    """What has the enumeration's members as its attributes, and nothing else of it."""
    # The attributes of a module are those that Python reads most quickly.
    module = ModuleType(kind.__name__)
    module.__dict__.update(kind.__members__)
    return cast("type[E]", module)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def frozen(kind: type[T]) -> type[T]:
    """Make it a frozen dataclass with slots, to whose constructor each field is given by its name.

    Until it has its fields, an instance is of a class like it that lets them be stored.
    """
    made = dataclass(frozen=True, slots=True, kw_only=True)(kind)
    if not hasattr(made, "__post_init__"):
        setattr(made, "__init__", _constructor(made))  # noqa: B010 - to assign it, mypy says, is unsound
    return made


def maker(kind: type[T]) -> type[T]:
    """What is called as a frozen dataclass, ours or stageflow's, and makes an instance of it as quickly as Python calls a function.

    Of one that looks at its fields when it has them, as `__post_init__` does, it is the class itself.
    """
    if hasattr(kind, "__post_init__"):
        return kind
    known: dict[str, Any] = {"_made": kind, "_unfrozen": unfrozen(kind)}
    each = fields(cast("Any", kind))
    # Not by name alone, of what has a default last: Python would look up each default that it needs in a dict.
    parameters = sorted((one for one in _parameters(each, known) if one != "*"), key=lambda one: "=" in one)
    source = f"""
def make({", ".join(parameters)}):
    self = _unfrozen()
    {_stores(each)}
    self.__class__ = _made
    return self
"""
    exec(source, known)  # noqa: S102 - as below
    return cast("type[T]", known["make"])


def changer(kind: type[T], part: str) -> Callable[[T, Any], T]:
    """What makes a copy of an instance of a class that is `frozen`, in which this part is another."""
    known: dict[str, Any] = {"_made": kind, "_unfrozen": unfrozen(kind)}
    values = {one.name: "other" if one.name == part else f"of.{one.name}" for one in fields(cast("Any", kind))}
    source = f"""
def change(of, other):
    self = _unfrozen()
    {"; ".join(f"self.{name} = {value}" for name, value in values.items())}
    self.__class__ = _made
    return self
"""
    exec(source, known)  # noqa: S102 - as below
    return cast("Callable[[T, Any], T]", known["change"])


def model_maker(kind: type[M]) -> type[M]:
    """What is called as a pydantic model is, with all of its fields, of which it is known that they are valid.

    It makes what `model_construct` does, which takes longer than to validate them. Nothing is to be seen to beside the fields.
    """

    def make(**each: Any) -> M:
        return filled(kind, each, set(each))

    return cast("type[M]", make)


def filled(kind: type[M], valid: dict[str, Any], given: set[str]) -> M:
    """A pydantic model of these fields, of which it is known that they are valid, and which of them were given.

    No method of the model: to look one up pydantic takes as long as all of this.
    """
    made, put = object.__new__(kind), object.__setattr__
    put(made, "__dict__", valid)
    put(made, "__pydantic_fields_set__", given)
    put(made, "__pydantic_extra__", None)
    put(made, "__pydantic_private__", None)
    return made


def unfrozen(kind: type[T]) -> Callable[[], T]:
    """A class like a frozen one that lets fields be stored: what has them all is made one of the frozen class."""
    # Called for nothing but an object without fields, which takes a quarter less than to call `object.__new__`.
    as_any_object = {name: getattr(object, name) for name in ("__init__", "__setattr__", "__delattr__")}
    return type(kind.__name__, (kind,), {"__slots__": ()} | as_any_object)


def _constructor(made: type[Any]) -> Any:
    """What stores the fields of a new instance; those of a derived class are left to the constructor that dataclasses have made."""
    known: dict[str, Any] = {"_made": made, "_unfrozen": unfrozen(made), "_as_dataclasses_do": made.__init__, "_set": object.__setattr__}
    each = fields(made)
    source = f"""
def __init__(self, {", ".join(_parameters(each, known))}):
    if self.__class__ is not _made:
        return _as_dataclasses_do(self, {", ".join(f"{one.name}={_value(one)}" for one in each)})
    _set(self, "__class__", _unfrozen)
    {_stores(each)}
    self.__class__ = _made
"""
    exec(source, known)  # noqa: S102 - names of fields are all that is not written here; dataclasses do the same
    return update_wrapper(known["__init__"], made.__init__)


def _parameters(each: tuple[Field[Any], ...], known: dict[str, Any]) -> list[str]:
    by_place = [_parameter(one, known) for one in each if not one.kw_only]
    by_name = [_parameter(one, known) for one in each if one.kw_only]
    return [*by_place, "*", *by_name] if by_name else by_place


def _parameter(one: Field[Any], known: dict[str, Any]) -> str:
    if one.default is not MISSING:
        known[f"_default_{one.name}"] = one.default
        return f"{one.name}=_default_{one.name}"
    if one.default_factory is not MISSING:
        known[f"_new_{one.name}"] = one.default_factory
        return f"{one.name}=_made"  # the class itself: nobody gives that
    return one.name


def _stores(each: tuple[Field[Any], ...]) -> str:
    return "; ".join(f"self.{one.name} = {_value(one)}" for one in each)


def _value(one: Field[Any]) -> str:
    return one.name if one.default_factory is MISSING else f"_new_{one.name}() if {one.name} is _made else {one.name}"
