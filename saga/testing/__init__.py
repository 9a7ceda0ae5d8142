"""The kit with which users test their own sagas: it fails a saga everywhere, and proves that the world comes back.

It plays sagas in one process and needs no test framework; `saga.pytest_plugin` brings it to pytest.
"""

from saga.testing.faults import Fault, InjectedFault
from saga.testing.outside import World
from saga.testing.verification import Trial, Verification, VerificationFailed, verify

__all__ = ["Fault", "InjectedFault", "Trial", "Verification", "VerificationFailed", "World", "verify"]
