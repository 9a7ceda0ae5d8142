"""On what it was measured: enough to compare two runs, nothing that tells whose machine it was."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = {"stageflow": "stageflow-core", "saga": "stageflow-saga", "sagaz": "sagaz", "pydantic": "pydantic", "anyio": "anyio"}


def description() -> dict[str, str]:
    """Describe interpreter, processor, date and libraries."""
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{_cpu()}, {os.cpu_count()} seen",
        "load": _load(),
    }
    return found | {name: _version(package) for name, package in _PACKAGES.items()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown"


def _load() -> str:
    """The load of the machine over the last minute, before we add ours."""
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except OSError:
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from source" if package == "stageflow-saga" else "not installed"
