"""A pipeline, read and checked once: its graph, and what each stage offers.

Everything that can be known to be wrong is refused here, before anything runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product, starmap
from operator import is_
from typing import TYPE_CHECKING, Any, Final

from stageflow.api import Pipeline, StageOutput

from saga.errors import MisuseError, PipelineInvalid, PolicyInvalid
from saga.graph import Graph
from saga.models import restored
from saga.policies import ContinueWithFallback, FailFast
from saga.quick import frozen
from saga.stages import DECLARABLE, StageOffer, read_stage
from saga.text import did_you_mean, shown

if TYPE_CHECKING:
    from stageflow.pipeline.pipeline import UnifiedStageSpec

    from saga.recovery.record import StageRecord


@frozen
class Blueprint:
    """A checked pipeline.

    Attributes:
        name: The pipeline's.
        graph: Its stages and what each offers, in topological order.
        stages: What the graph can't hold, in topological order.
        specs: The pipeline's own specs, by which a later change is noticed.
        runners: What runs each, and the functions in those that are partial.
        said: What these said of themselves, each in the order of `DECLARABLE`; as above.
        without_timeouts: What turns stageflow's own timeouts off, in its context's data.
    """

    name: str
    graph: Graph
    stages: dict[str, StageOffer]
    specs: tuple[UnifiedStageSpec, ...]
    runners: list[Any]
    said: list[Any]
    without_timeouts: dict[str, int]

    @classmethod
    def of(cls, pipeline: Pipeline) -> Blueprint:
        """Read a pipeline, or remember what was read of it as long as its stages are the same, and say the same of themselves.

        Raises:
            PipelineInvalid: It, or one of its stages, can't be run as a saga; the error names the stage.
        """
        if not isinstance(pipeline, Pipeline):
            raise PipelineInvalid("a stageflow Pipeline", got=repr(pipeline))
        key, specs = id(pipeline), tuple(pipeline.stages.values())
        known = _KNOWN.get(key)
        if known is not None and known[1].is_of(specs):
            return known[1]
        blueprint = cls._read(pipeline, specs)
        if len(_KNOWN) >= _MOST_KNOWN:
            # A pipeline that a stage of its own refers to is kept alive by what was read of it.
            _KNOWN.pop(next(iter(_KNOWN)), None)  # its pipeline may be gone just now
        remembered = _KNOWN  # as Python ends, the names of a module may be gone before the pipeline is
        _KNOWN[key] = (weakref.ref(pipeline, lambda _: remembered.pop(key, None)), blueprint)
        return blueprint

    def is_of(self, specs: tuple[UnifiedStageSpec, ...]) -> bool:
        """Whether it was read of these, and they still say the same of themselves."""
        # A stage may equal the one in whose place it was put, as that of a dataclass, and is another one.
        return len(specs) == len(self.specs) and all(map(is_, specs, self.specs)) and _said(self.runners) == self.said

    @classmethod
    def _read(cls, pipeline: Pipeline, specs: tuple[UnifiedStageSpec, ...]) -> Blueprint:
        runners: list[Any] = [spec.runner for spec in specs]
        runners += [runner.func for runner in runners if isinstance(runner, partial)]
        said = _said(runners)
        read = {name: read_stage(name, spec) for name, spec in pipeline.stages.items()}
        for name, spec in pipeline.stages.items():
            _refuse_str(name, spec.dependencies, pipeline.stages)
        graph = Graph.of(node for node, _ in read.values())
        return cls(
            name=pipeline.name,
            graph=graph,
            stages={name: read[name][1] for name in graph.names},
            specs=specs,
            runners=runners,
            said=said,
            without_timeouts={"_timeout_ms": 0} | {f"_timeout.{name}": 0 for name in graph.names},
        )

    def restored(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """The data of several stages that comes from a durable ledger, made what they declare it to be."""
        return {name: self._restored(self.stages[name], data) if name in self.stages else data for name, data in outputs.items()}

    @staticmethod
    def _restored(offer: StageOffer, data: Any) -> Any:
        """The data of one, made what the stage, or each one of the saga that it runs, declares it to be."""
        if offer.output_model is not None:
            return restored(offer.spec.name, offer.output_model, data)
        if offer.nested_pipeline is not None and isinstance(data, dict) and isinstance(within := data.get("outputs"), dict):
            return data | {"outputs": Blueprint.of(offer.nested_pipeline).restored(within)}
        return data

    def restore_outputs(self, records: Mapping[str, StageRecord]) -> None:
        """Make outputs that come from a durable ledger what their stages declare them to be.

        One that does not fit its stage's `output_model` stays plain data, and the log says why. It is no reason to refuse
        the saga: what was recorded stays as it is, and nobody could ever go on with it.
        """
        for name, offer in self.stages.items():
            record = records[name]
            for part in ("output", "late_output"):
                output: StageOutput | None = getattr(record, part)
                if output is not None and (record.landed or record.fell_back):
                    setattr(record, part, replace(output, data=self._restored(offer, output.data)))

    def check_policy(self, policy: FailFast | ContinueWithFallback) -> None:
        """Refuse a policy that speaks of stages that aren't there.

        Raises:
            PolicyInvalid: It does.
        """
        refuse_no_policy(policy)
        for name in policy.fallbacks if isinstance(policy, ContinueWithFallback) else ():
            if name not in self.stages:
                raise PolicyInvalid(
                    f"fallbacks for stages of pipeline {self.name!r} ({', '.join(self.stages)})",
                    got=repr(name),
                    hint=did_you_mean(name, self.stages),
                )


def _said(runners: list[Any]) -> list[Any]:
    # All of it in C: it is asked before each saga. To say that a class lacks one takes Python 3.11 as long as to give five that it has.
    return [*starmap(getattr, product(runners, DECLARABLE, (None,)))]


def read(pipeline: Pipeline, policy: FailFast | ContinueWithFallback) -> Blueprint:
    """Read a pipeline, for a policy.

    Raises:
        MisuseError: It can't work, or the policy is not for it.
    """
    blueprint = Blueprint.of(pipeline)
    blueprint.check_policy(policy)
    return blueprint


def by_name(pipelines: object) -> dict[str, Pipeline]:
    """The pipelines under the names by which sagas are to find them.

    Args:
        pipelines: One, or those that are given, found by their names; as a mapping, by its keys.

    Raises:
        MisuseError: One is no pipeline, or two that differ have one name: what either is for can't be known.
    """
    if isinstance(pipelines, Pipeline):
        pipelines = (pipelines,)
    if isinstance(pipelines, str) or not isinstance(pipelines, Iterable):
        raise MisuseError("the pipelines that the sagas were started with", got=shown(pipelines))
    named = pipelines.items() if isinstance(pipelines, Mapping) else [(getattr(each, "name", ""), each) for each in pipelines]
    found: dict[str, Pipeline] = {}
    for name, pipeline in named:
        if not isinstance(pipeline, Pipeline):
            raise PipelineInvalid("a stageflow Pipeline", got=shown(pipeline))
        if found.setdefault(name, pipeline) is not pipeline:
            hint = "Give those that differ in calls of their own."
            raise MisuseError("one pipeline of each name", got=f"several named {name!r}", hint=hint)
    return found


def refuse_no_policy(policy: object) -> None:
    """Refuse what is neither a policy nor None.

    Raises:
        PolicyInvalid: It is something else.
    """
    if policy is not None and not isinstance(policy, FailFast | ContinueWithFallback):
        hint = f"Write {policy.__name__}()." if isinstance(policy, type) and issubclass(policy, FailFast | ContinueWithFallback) else ""
        raise PolicyInvalid("a FailFast or a ContinueWithFallback policy", got=repr(policy), hint=hint)


def _refuse_str(name: str, dependencies: Sequence[str], stages: Mapping[str, object]) -> None:
    """Refuse a str in the place of a tuple; stageflow makes one of it, so ("seat") comes here as ('s', 'e', 'a', 't')."""
    word = "".join(dependencies)
    is_taken_apart = len(dependencies) > 1 and len(word) == len(dependencies) and not stages.keys() >= set(dependencies)
    if isinstance(dependencies, str) or is_taken_apart:
        hint = f"Write ({word!r},)." if word in stages else ""
        raise PipelineInvalid("dependencies to be a tuple of names", got=f"the str {word!r}", stage=name, hint=hint)


_MOST_KNOWN: Final = 1000
_KNOWN: Final[dict[int, tuple[weakref.ref[Pipeline], Blueprint]]] = {}
"""What was read of the pipelines that are alive, by identity: a pipeline has no hash."""
