"""Where the stages of a graph go: in layers, with few crossings, near to what they depend on.

Every stage is one layer behind the last of its dependencies (longest path). Within the layers, sweeps order the stages by the
barycentre of their neighbours (Sugiyama, Tagawa and Toda, 1981), and the order with the fewest crossings wins. Places then
follow by least squares: each as near to its neighbours as order and distances allow.

An arrow that passes layers runs through a lane of its own in each, so that no arrow crosses a box. The arrows out of one stage
share their lanes, which keeps a stage on which hundreds depend readable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

_SWEEPS: Final = 12
_LANE: Final = 24.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes. Layers are counted along the arrows, places are measured across them.

    Attributes:
        layers: How many there are.
        layer: For each stage, its layer; 0 is the first.
        place: For each stage, the place of its middle.
        lanes: For each stage, the places of its arrows' lane in the layers behind it, as far as one of them reaches.
        breadth: How far everything reaches across; places begin at 0.
    """

    layers: int
    layer: Mapping[str, int]
    place: Mapping[str, float]
    lanes: Mapping[str, tuple[float, ...]]
    breadth: float


def layout(dependencies: Mapping[str, Sequence[str]], sizes: Mapping[str, float]) -> Layout:
    """Lay a graph out; what is not joined in any way comes one after the other.

    Args:
        dependencies: For each stage, in topological order, what it depends on.
        sizes: How much room each stage takes across, with what is to stay free around it.
    """
    layer = _layers(dependencies)
    place: dict[str, float] = {}
    lanes: dict[str, tuple[float, ...]] = {}
    breadth = 0.0
    for names in _apart(dependencies):
        joined = _Joined(names, dependencies, layer, sizes)
        across = joined.places()
        start = breadth - min(middle - room / 2 for middle, room in zip(across, joined.room, strict=True))
        breadth = start + max(middle + room / 2 for middle, room in zip(across, joined.room, strict=True))
        place |= {name: start + across[dot] for dot, name in enumerate(names)}
        lanes |= {name: tuple(start + across[dot] for dot in joined.lanes[at]) for at, name in enumerate(names)}
    return Layout(layers=max(layer.values(), default=-1) + 1, layer=layer, place=place, lanes=lanes, breadth=breadth)


def _layers(dependencies: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Each stage's layer: behind all that it depends on, and for the rest as near as can be to what depends on it."""
    layer: dict[str, int] = {}
    for name, needed in dependencies.items():
        layer[name] = max((layer[other] + 1 for other in needed), default=0)
    latest: dict[str, int] = {}
    for name in reversed(list(dependencies)):
        needed = dependencies[name]
        # With at most one arrow in, what the move adds before the stage it saves behind it, or more.
        if name in latest and len(needed) <= 1:
            layer[name] = latest[name]
        for other in needed:
            latest[other] = min(latest.get(other, layer[name]), layer[name] - 1)
    return layer


def _apart(dependencies: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The stages that are joined, directly or through others; each group in topological order, too."""
    group: dict[str, list[str]] = {}
    for name, needed in dependencies.items():
        mine = [name]
        for other in needed:
            if group[other] is not mine:
                small, mine = sorted((mine, group[other]), key=len)
                mine += small
                group.update(dict.fromkeys(small, mine))
        group[name] = mine
    place = {name: index for index, name in enumerate(dependencies)}
    return [sorted(names, key=place.__getitem__) for names in {id(names): names for names in group.values()}.values()]


class _Joined:
    """Stages that are joined, and their lanes; both are dots that are joined with dots of the next layer only.

    Attributes:
        room: How much room each dot takes across; the stages come first.
        lanes: For each stage, the dots of its lanes.
    """

    def __init__(
        self, names: Sequence[str], dependencies: Mapping[str, Sequence[str]], layer: Mapping[str, int], sizes: Mapping[str, float]
    ) -> None:
        number = {name: index for index, name in enumerate(names)}
        self._stages = len(names)
        self.room = [sizes[name] for name in names]
        self._layer = [layer[name] for name in names]
        reach = list(self._layer)
        for name in names:
            for needed in dependencies[name]:
                reach[number[needed]] = max(reach[number[needed]], layer[name] - 1)
        self.lanes: list[range] = []
        for stage in range(self._stages):
            passed = range(self._layer[stage] + 1, reach[stage] + 1)
            self.lanes.append(range(len(self.room), len(self.room) + len(passed)))
            self.room += [_LANE] * len(passed)
            self._layer += passed
        self._before: list[list[int]] = [[] for _ in self.room]
        self._after: list[list[int]] = [[] for _ in self.room]
        for stage, lanes in enumerate(self.lanes):
            for first, second in zip([stage, *lanes], lanes, strict=False):
                self._join(first, second)
        for name in names:
            for needed in dependencies[name]:
                source, steps = number[needed], layer[name] - layer[needed] - 1
                self._join(self.lanes[source][steps - 1] if steps else source, number[name])

    def _join(self, first: int, second: int) -> None:
        self._after[first].append(second)
        self._before[second].append(first)

    def places(self) -> list[float]:
        """The place of each dot's middle."""
        return _placed(_ordered(self._layer, self._before, self._after), self.room, self._before, self._after, self._stages)


def _ordered(layer: list[int], before: list[list[int]], after: list[list[int]]) -> list[list[int]]:
    """The dots of each layer in an order with few crossings."""
    rows: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for dot in _along_the_arrows(before, after):
        rows[layer[dot]].append(dot)
    best, fewest = [list(row) for row in rows], _crossings(rows, after)
    for sweep in range(_SWEEPS):
        if fewest == 0:
            break
        forward = sweep % 2 == 0
        place = {dot: float(at) for row in rows for at, dot in enumerate(row)}
        for row in rows if forward else reversed(rows):
            pull = {dot: _mean([place[other] for other in (before if forward else after)[dot]], place[dot]) for dot in row}
            row.sort(key=pull.__getitem__)
            place.update((dot, float(at)) for at, dot in enumerate(row))
        crossings = _crossings(rows, after)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _along_the_arrows(before: list[list[int]], after: list[list[int]]) -> list[int]:
    """All dots, depth first, so that what belongs together begins together."""
    seen: set[int] = set()
    found = []
    pending = [dot for dot in reversed(range(len(before))) if not before[dot]]
    while pending:
        dot = pending.pop()
        if dot not in seen:
            seen.add(dot)
            found.append(dot)
            pending += reversed(after[dot])
    return found


def _crossings(rows: list[list[int]], after: list[list[int]]) -> int:
    """How many pairs of joints between neighbouring layers cross: for each, how many that began before it end behind it.

    Those that have begun are counted in a tree over the places where they end (Barth, Jünger and Mutzel, 2002).
    """
    crossings = 0
    for row, following in pairwise(rows):
        leaves = 1 << len(following).bit_length()
        leaf = {dot: leaves + at for at, dot in enumerate(following)}
        begun = [0] * (2 * leaves)
        for dot in row:
            # In order: of what begins in one place nothing crosses.
            for node in sorted([leaf[other] for other in after[dot]]):
                while node > 1:
                    begun[node] += 1
                    if node % 2 == 0:
                        crossings += begun[node + 1]
                    node //= 2  # noqa: PLW2901 - up to the root
    return crossings


def _placed(rows: list[list[int]], room: list[float], before: list[list[int]], after: list[list[int]], stages: int) -> list[float]:
    """The place of each dot's middle: near to its neighbours, in the order of its layer, without overlaps."""
    across = [0.0] * len(room)
    for row in rows:
        edge = 0.0
        for dot in row:
            across[dot] = edge + room[dot] / 2
            edge += room[dot]
    # The last sweep minds both sides, so that a stage stands between what it needs and what needs it.
    for sweep in range(_SWEEPS + 1):
        sides = [before, after] if sweep == _SWEEPS else [after if sweep % 2 else before]
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted, weights = [], []
            for dot in row:
                others = [other for side in sides for other in side[dot]]
                # A lane counts more, for a long arrow reads best when it is straight.
                pull = [(across[other], 1 if other < stages and dot < stages else 3) for other in others]
                weight = sum(weight for _, weight in pull)
                wanted.append(sum(place * weight for place, weight in pull) / weight if weight else across[dot])
                weights.append(weight or 0.1)
            for dot, place in zip(row, _spread(wanted, weights, [room[dot] for dot in row]), strict=True):
                across[dot] = place
    return across


def _spread(wanted: list[float], weights: list[float], room: list[float]) -> list[float]:
    """The places nearest to those wanted, by weighted least squares, that keep the order and don't overlap.

    With the room before each taken off, what is left is to be non-decreasing: isotonic regression, which pooling neighbours
    that are out of order solves (Ayer et al., 1955).
    """
    offsets, offset = [], 0.0
    for index, size in enumerate(room):
        offset += (room[index - 1] + size) / 2 if index else 0.0
        offsets.append(offset)
    pools: list[tuple[float, float, int]] = []
    for place, weight, offset in zip(wanted, weights, offsets, strict=True):
        pool = (place - offset, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            value, heft, count = pools.pop()
            heavier = heft + pool[1]
            pool = ((value * heft + pool[0] * pool[1]) / heavier, heavier, count + pool[2])
        pools.append(pool)
    values = [value for value, _, count in pools for _ in range(count)]
    return [value + offset for value, offset in zip(values, offsets, strict=True)]


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
