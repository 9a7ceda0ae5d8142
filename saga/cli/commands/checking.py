"""What is said of a pipeline before it runs: check and explain."""

from __future__ import annotations

import typer
from pydantic import TypeAdapter

from saga.cli.commands.given import AsJson, PolicyFile, Target, policy_of
from saga.cli.commands.printed import print_json
from saga.cli.exits import Exit
from saga.cli.pipelines import load
from saga.lint import Explanation, Finding, Severity
from saga.lint import check as find
from saga.lint import explain as consequences


def check(target: Target, policy: PolicyFile = None, as_json: AsJson = False) -> None:
    """Find what is wrong with a pipeline, without running it."""
    findings = find(load(target), policy_of(policy))
    if as_json:
        print_json(TypeAdapter(list[Finding]).dump_json(findings).decode())
    else:
        for finding in findings:
            typer.echo(finding)
    raise typer.Exit(Exit.FOUND if any(finding.severity is Severity.ERROR for finding in findings) else Exit.COMPLETED)


def explain(target: Target, policy: PolicyFile = None, as_json: AsJson = False) -> None:
    """Say for every stage what follows when it fails."""
    explanation = consequences(load(target), policy_of(policy))
    if as_json:
        print_json(TypeAdapter(Explanation).dump_json(explanation).decode())
    else:
        typer.echo(explanation)
