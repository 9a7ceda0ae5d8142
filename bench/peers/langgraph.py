"""LangGraph with its SQLite checkpointer: `python -m bench.peers.langgraph DIRECTORY DSN`.

`durability="sync"`: a step's checkpoint is written before the next step starts; the default, "async", may lose the last ones. The
checkpointer opens SQLite with a WAL and `synchronous=FULL`. LangGraph has no compensation: the fifth node says that it failed, and an
edge leads to four nodes that undo, as its documentation has it for errors that are handled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypedDict

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

from bench.peers.turns import WORLD, Run, Unexpected, serve


class State(TypedDict, total=False):
    """What the graph passes on."""

    fails: bool
    at: int


def _step(number: int) -> Any:
    async def step(state: State) -> State:
        if number == 4 and state["fails"]:
            return {"at": -1}
        WORLD.done += 1
        return {"at": number}

    return step


def _undo(number: int) -> Any:
    async def undo(_state: State) -> State:
        WORLD.undone += 1
        return {"at": number}

    return undo


def _graph() -> Any:
    graph = StateGraph(State)
    for number in range(5):
        graph.add_node(f"step_{number}", _step(number))
        graph.add_edge(START if number == 0 else f"step_{number - 1}", f"step_{number}")
    for number in range(4):
        graph.add_node(f"undo_{number}", _undo(number))
        graph.add_edge(f"undo_{number}", END if number == 0 else f"undo_{number - 1}")
    graph.add_conditional_edges("step_4", lambda state: "undo_3" if state["at"] < 0 else END, ["undo_3", END])
    return graph


@asynccontextmanager
async def langgraph(directory: Path, _dsn: str) -> AsyncIterator[Run]:
    """Run threads on one file."""
    numbers = count()
    async with AsyncSqliteSaver.from_conn_string(str(directory / "checkpoints.db")) as saver:
        app = _graph().compile(checkpointer=saver)

        async def run(fails: bool) -> None:
            thread = {"configurable": {"thread_id": str(next(numbers))}}
            state = await app.ainvoke({"fails": fails}, thread, durability="sync")
            if state["at"] != (0 if fails else 4):
                raise Unexpected(f"got {state}")

        yield run


if __name__ == "__main__":
    serve(langgraph, "langgraph", "langgraph-checkpoint-sqlite")
