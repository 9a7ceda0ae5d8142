"""What a pipeline's design leads to, before it runs.

`check` finds what is wrong with it, `explain` says what follows when a stage fails. Pure: no stage is run.
"""

from saga.lint.consequences import Consequence, Explanation, explain
from saga.lint.findings import Finding, FindingCode, Severity, check

__all__ = ["Consequence", "Explanation", "Finding", "FindingCode", "Severity", "check", "explain"]
