"""JSON schemas of what goes in and out as JSON: `python -m saga.schemas DIRECTORY` writes them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from saga.events import AnyEvent
from saga.policies import Policy
from saga.report import SagaReport

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_FIELD: Final = re.compile(r"^ {4}(\w+): ", re.MULTILINE)


def schemas() -> dict[str, dict[str, Any]]:
    """The schemas by the names of their files: the policy as it may be written, the report and an event as they are stored."""
    return {
        "policy.json": _schema("A saga's policy", _with_its_key(TypeAdapter(Policy).json_schema(mode="validation"))),
        "report.json": _schema("A saga's report", TypeAdapter(SagaReport).json_schema(mode="serialization")),
        "events.json": _schema("An event of a saga's ledger", TypeAdapter(AnyEvent).json_schema(mode="serialization")),
    }


def _schema(title: str, schema: dict[str, Any]) -> dict[str, Any]:
    for part in [schema, *schema.get("$defs", {}).values()]:
        _describe(part)
    return {"$schema": _DIALECT, "title": title, **{key: value for key, value in schema.items() if key != "title"}}


def _with_its_key(schema: dict[str, Any]) -> dict[str, Any]:
    """Require the key that says which policy it is: in Python each has its own as a default, a file has to name it."""
    for part in schema["$defs"].values():
        if "policy" in part["properties"]:
            part["required"] = ["policy"]
    return schema


def _describe(schema: dict[str, Any]) -> None:
    """Take the description of a model apart: what its docstring says of a field goes to the field."""
    summary, _, rest = schema.get("description", "").partition("\n\nAttributes:\n")
    if not rest:
        return
    listed, _, more = rest.partition("\n\n")
    schema["description"] = "\n\n".join(part for part in (summary, more) if part)
    for name, words in _fields(listed):
        if name in schema["properties"]:
            schema["properties"][name]["description"] = words


def _fields(listed: str) -> Iterator[tuple[str, str]]:
    _, *parts = _FIELD.split(listed)
    for name, words in zip(parts[::2], parts[1::2], strict=True):
        yield name, " ".join(words.split())


def main(arguments: list[str] | None = None) -> None:
    """Write the schemas into a directory."""
    parser = argparse.ArgumentParser(prog="python -m saga.schemas", description="Write the JSON schemas of policy, report and events.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args(arguments).directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        (directory / name).write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
