"""saga: compensation for stageflow pipelines.

A stage declares `compensate()` beside `execute()`; when a stage fails, what took effect is undone, dependents before what
they depend on, and a report says for every stage whether its output is kept, undone, or needs a person.
"""

from saga.compensable import CompensableStage, PivotStage, compensable
from saga.contexts import CompensationContext, SagaContext
from saga.coordinator import SagaCoordinator
from saga.errors import (
    GraphChanged,
    LedgerConflict,
    LedgerCorrupt,
    LedgerError,
    MisuseError,
    NotStorable,
    PipelineInvalid,
    PolicyInvalid,
    SagaError,
    SagaExists,
    SagaFailed,
    SagaNotFound,
    SagasDamaged,
    SagaUnrecorded,
)
from saga.events import SagaStatus, Verdict
from saga.failures import Failure, FailureKind
from saga.ledger import Ledger, MemoryLedger, StageState
from saga.nested import nested
from saga.policies import Compensation, ContinueWithFallback, FailFast, Policy, Retry, load_policy
from saga.report import Recovery, SagaReport, StageReport

__all__ = [
    "CompensableStage",
    "Compensation",
    "CompensationContext",
    "ContinueWithFallback",
    "FailFast",
    "Failure",
    "FailureKind",
    "GraphChanged",
    "Ledger",
    "LedgerConflict",
    "LedgerCorrupt",
    "LedgerError",
    "MemoryLedger",
    "MisuseError",
    "NotStorable",
    "PipelineInvalid",
    "PivotStage",
    "Policy",
    "PolicyInvalid",
    "Recovery",
    "Retry",
    "SagaContext",
    "SagaCoordinator",
    "SagaError",
    "SagaExists",
    "SagaFailed",
    "SagaNotFound",
    "SagaReport",
    "SagaStatus",
    "SagaUnrecorded",
    "SagasDamaged",
    "StageReport",
    "StageState",
    "Verdict",
    "compensable",
    "load_policy",
    "nested",
]
