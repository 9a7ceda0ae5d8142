"""The pictures of a report: well-formed, complete, readable by everybody, and harmless whatever they hold."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stageflow.api import Pipeline, PipelineContext, StageOutput

from saga import ContinueWithFallback, FailFast, FailureKind, MisuseError, SagaCoordinator, SagaReport, SagaStatus, StageState
from saga.events import (
    CompensationStarted,
    EffectRecorded,
    FallbackFailed,
    FallbackUsed,
    SagaResumed,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSkipped,
    StageStarted,
)
from saga.render.colours import DARK, LIGHT, Scheme
from saga.render.drawing import Box, Drawing, drawing
from saga.render.graph import graph_svg
from saga.render.layout import Layout, _crossings, layout
from saga.render.lettering import cells, shortened, wrapped
from saga.render.wording import SIGNS, duration
from tests.controlled import run
from tests.growth import growth
from tests.stories import (
    BEGIN,
    HOSTILE,
    PICTURES,
    Story,
    chain,
    failure,
    fan,
    hostile,
    many_stages,
    moment,
    three_stages,
    twelve_stages,
)
from tests.world import DIAMOND, SEQUENCE, Script, hooked, scene

SVG = "{http://www.w3.org/2000/svg}"
ALL = {"three": three_stages, "twelve": twelve_stages, "three hundred": many_stages, "chain": lambda: chain(40), "hostile": hostile}
XML = "\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff"


@pytest.fixture(scope="module", params=ALL)
def report(request: pytest.FixtureRequest) -> SagaReport:
    return ALL[request.param]()


def parsed(svg: str) -> ET.Element:
    svg.encode()
    return ET.fromstring(svg)  # noqa: S314 - our own


def texts(element: ET.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def groups(svg: str) -> dict[str, ET.Element]:
    """The boxes of a graph, or the bars of a timeline, by their hints."""
    found = {}
    for group in parsed(svg).iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            found[title.text or ""] = group
    return found


def printable(text: str) -> str:
    """What becomes of a text on its way through XML or HTML."""
    return re.sub(f"[^{XML}]", "\ufffd", re.sub("\r\n?", "\n", text))


# -- where things go ----------------------------------------------------------------------------------------------


def laid(dependencies: Mapping[str, Sequence[str]]) -> Layout:
    return layout(dependencies, dict.fromkeys(dependencies, 60.0))


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    names = [f"s{number}" for number in range(draw(st.integers(1, 18)))]
    return {
        name: tuple(draw(st.lists(st.sampled_from(names[:index]), unique=True, max_size=3))) if index else ()
        for index, name in enumerate(names)
    }


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_in_any_graph_stages_stand_behind_what_they_need_and_neither_they_nor_lanes_overlap(graph: dict[str, tuple[str, ...]]) -> None:
    its = laid(graph)

    taken: dict[int, list[tuple[float, float]]] = {}
    for name, needed in graph.items():
        assert all(its.layer[other] < its.layer[name] for other in needed)
        taken.setdefault(its.layer[name], []).append((its.place[name], 30))
        reach = max([its.layer[other] for other in graph if name in graph[other]], default=its.layer[name] + 1)
        assert len(its.lanes[name]) == reach - its.layer[name] - 1
        for step, lane in enumerate(its.lanes[name], its.layer[name] + 1):
            taken.setdefault(step, []).append((lane, 12))
    assert set(taken) == set(range(its.layers))
    for row in taken.values():
        for (first, half), (second, other) in itertools.pairwise(sorted(row)):
            assert second - first >= half + other - 1e-6
        assert min(place - half for place, half in row) >= -1e-6
        assert max(place + half for place, half in row) <= its.breadth + 1e-6


def crossings(graph: Mapping[str, Sequence[str]], its: Layout) -> int:
    hops = []
    for name, needed in graph.items():
        for other in needed:
            stops = [its.place[other], *its.lanes[other][: its.layer[name] - its.layer[other] - 1], its.place[name]]
            hops += [(its.layer[other] + step, *ends) for step, ends in enumerate(itertools.pairwise(stops))]
    return sum(
        first[0] == second[0] and (first[1] - second[1]) * (first[2] - second[2]) < 0
        for first, second in itertools.combinations(set(hops), 2)
    )


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param({"a": (), "b": (), "c": (), "x": ("c",), "y": ("b",), "z": ("a",)}, id="parallel chains"),
        pytest.param({"r": (), "a": ("r",), "b": ("r",), "a1": ("a",), "b1": ("b",), "a2": ("a",), "b2": ("b",)}, id="a tree"),
        pytest.param({"a": (), "b": (), "c": (), "p": ("a", "c"), "q": ("b",), "end": ("p", "q")}, id="joined out of order"),
        pytest.param({"a": (), "b": ("a",), "c": ("b",), "d": ("c", "a")}, id="a long arrow beside a chain"),
        pytest.param(
            {"a": (), "b": ("a",), "c": ("a",), "d": ("c", "a"), "e": ("b", "c"), "f": ("b",), "g": ("f", "b")}, id="four that sweeps undo"
        ),
    ],
)
def test_what_can_be_drawn_without_crossings_is(graph: dict[str, tuple[str, ...]]) -> None:
    assert crossings(graph, laid(graph)) == 0


@given(st.data())
def test_all_crossings_are_counted_and_no_other_ones(data: st.DataObject) -> None:
    first = data.draw(st.permutations(range(data.draw(st.integers(1, 6)))))
    second = data.draw(st.permutations(range(len(first), len(first) + data.draw(st.integers(1, 6)))))
    after = [data.draw(st.lists(st.sampled_from(second), unique=True)) for _ in first] + [[] for _ in second]

    joints = [(first.index(dot), second.index(other)) for dot in first for other in after[dot]]
    crossed = sum((one[0] - other[0]) * (one[1] - other[1]) < 0 for one, other in itertools.combinations(joints, 2))
    assert _crossings([first, second], after) == crossed


def test_a_stage_stands_in_the_middle_of_what_it_needs() -> None:
    its = laid({"a": (), "b": (), "c": ("a", "b")})

    assert its.place["c"] == pytest.approx((its.place["a"] + its.place["b"]) / 2)
    assert its.place["b"] - its.place["a"] == pytest.approx(60)


def test_a_source_stands_next_to_what_needs_it_and_not_at_the_far_end() -> None:
    its = laid({"a": (), "b": ("a",), "c": ("b",), "rates": (), "d": ("c", "rates")})

    assert its.layer["rates"] == its.layer["c"] == 2
    assert its.lanes["rates"] == ()


def test_what_is_not_joined_stands_apart() -> None:
    its = laid({"a": (), "x": (), "b": ("a",), "y": ("x",)})

    assert its.place["a"] == its.place["b"]
    assert its.place["x"] == its.place["y"] == its.place["a"] + 60


# -- the graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["graph", "timeline"])
def test_an_svg_is_well_formed_and_says_in_words_what_it_shows(report: SagaReport, view: Any) -> None:
    root = parsed(report.to_svg(view))

    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title") == root.get("aria-label")
    words = root.findtext(f"{SVG}desc") or ""
    assert report.status.value in words
    assert all(printable(name) in words for name in report.stages)


def test_the_picture_in_words_names_the_cause_the_states_and_the_order() -> None:
    assert drawing(three_stages()).description == (
        "compensated after 1.24 s. Cause: stage 'charge_card' raised at attempt 2: CardDeclined: the card was declined. "
        "Failed: charge_card. Undone: reserve_seat, reserve_room. Order of undoing: reserve_room, reserve_seat."
    )


def test_every_stage_is_in_the_graph_with_its_sign_its_state_and_its_whole_name(report: SagaReport) -> None:
    boxes = groups(report.to_svg())

    assert len(boxes) == len(report.stages)
    for (hint, box), (name, stage) in zip(boxes.items(), report.stages.items(), strict=True):
        sign, shown, label, *_ = texts(box)
        assert hint.startswith(f"{printable(name)}: {stage.state.value.replace('_', ' ')}")
        assert sign == SIGNS[stage.state]
        assert len(shown) <= 24
        assert label.startswith(stage.state.value.replace("_", " "))
        assert box.get("class") == f"saga-{stage.state.value}"


def test_the_stage_that_stopped_the_saga_is_marked_and_says_why() -> None:
    (cause,) = (box for hint, box in groups(three_stages().to_svg()).items() if hint.startswith("charge_card"))

    assert texts(cause) == ["x", "charge_card", "failed: the card was declined", "cause"]


def test_the_backward_run_has_its_order_at_the_stages() -> None:
    boxes = groups(twelve_stages().to_svg())

    assert {hint.partition(":")[0]: texts(box)[3] for hint, box in boxes.items() if len(texts(box)) > 3} == {
        "send_receipt": "1",
        "print_label": "2",
        "reserve_courier": "3",
        "charge_card": "4",
        "award_points": "5",
        "hand_over": "cause",
    }


def test_a_backward_arrow_leads_against_the_dependency_to_each_stage_that_was_undone() -> None:
    assert set(drawing(three_stages()).undoes) == {("charge_card", "reserve_seat"), ("charge_card", "reserve_room")}


def test_the_way_back_leads_through_stages_that_have_nothing_to_undo() -> None:
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")}, {"b": "plain"})

    report = run(SagaCoordinator().run(pipeline))

    assert report.compensation_order == ("a",)
    assert set(drawing(report).undoes) == {("c", "b"), ("b", "a")}
    assert 'class="saga-back"' in report.to_svg()


def test_no_way_back_is_drawn_where_nothing_was_undone() -> None:
    _, pipeline = scene(SEQUENCE, {"a": Script("raise")})

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert drawing(report).undoes == ()
    assert 'class="saga-back"' not in report.to_svg()
    assert "order of undoing" not in report.to_svg()


def test_a_saga_undone_on_demand_turns_round_at_its_last_stages() -> None:
    _, pipeline = scene(DIAMOND)
    coordinator = SagaCoordinator()

    async def undone() -> SagaReport:
        report = await coordinator.run(pipeline)
        return await coordinator.compensate(report.saga_id, pipeline)

    report = run(undone())

    assert set(drawing(report).undoes) == {("d", "b"), ("d", "c"), ("b", "a"), ("c", "a")}
    (back,) = (
        path.get("d") or ""
        for path in parsed(report.to_svg()).iter(f"{SVG}path")
        if path.get("class") == "saga-back" and len(path.get("d") or "") > 20
    )
    assert back.count("M") == 5
    assert report.cause is None
    assert "Cause" not in "".join(texts(parsed(report.to_svg())))


def size(report: SagaReport) -> tuple[float, float]:
    root = parsed(report.to_svg())
    return float(root.get("width") or 0), float(root.get("height") or 0)


def test_a_short_graph_reads_from_left_to_right_and_a_long_one_from_top_to_bottom() -> None:
    wide, high = size(chain(4))
    narrow, deep = size(chain(40))

    assert wide > high
    assert narrow < 600 < deep
    assert size(fan(40))[0] < 1100


def test_hundreds_of_arrows_at_one_stage_share_one_track() -> None:
    (path,) = (
        path.get("d") or ""
        for path in parsed(fan(100).to_svg()).iter(f"{SVG}path")
        if (path.get("class"), len(path.get("d") or "") > 99) == ("saga-run", True)
    )

    onto_the_track = re.findall(r"Q([\d.]+),", path)
    assert len(set(onto_the_track)) == 2


@pytest.mark.parametrize("all_need_the_first", [False, True])
def test_a_long_graph_is_drawn_in_proportion_to_its_length(all_need_the_first: bool) -> None:
    """All stages were gone through for each layer, and an arrow's whole way though others had shared it: 2,000 took nine seconds."""

    def drawn(many: int) -> Callable[[], str]:
        boxes = tuple(Box(f"s{place}", StageState.KEPT) for place in range(many))
        runs = [(f"s{place - 1}", f"s{place}") for place in range(1, many)]
        runs += [("s0", f"s{place}") for place in range(2, many) if all_need_the_first]
        return lambda: graph_svg(Drawing("t", StageState.KEPT, "completed", "", boxes, tuple(runs), ()))

    assert growth(drawn, 200) < 2.2


def test_names_are_shortened_in_the_middle_so_that_both_ends_tell_them_apart() -> None:
    assert shortened("reserve_seat", 12) == "reserve_seat"
    assert shortened("reserve_the_second_seat_14A", 12) == "reserv…t_14A"
    assert shortened("two\n lines", 12) == "two lines"
    assert shortened("日本語日本語日本語", 9) == "日本…本語"


def test_a_text_is_measured_in_the_columns_that_it_takes() -> None:
    assert [cells(text) for text in ("seat", "座席", "e\u0301", "\u202eab", "🚀")] == [4, 4, 1, 2, 2]


def test_a_label_for_which_a_box_was_made_wide_enough_is_not_cut() -> None:
    for length in range(1, 31):
        report = Story("p", {"a": ()}).fails("a", 0, 1, "y" * length).report
        (box,) = groups(report.to_svg()).values()
        assert texts(box)[2] == (f"failed: {'y' * length}" if length <= 22 else f"failed: {'y' * length}"[:29] + "…")


def test_a_text_is_broken_between_words_and_says_when_there_is_more() -> None:
    assert wrapped("the card was declined", 12, 3) == ["the card was", "declined"]
    assert wrapped("the card was declined twice over", 12, 2) == ["the card was", "declined tw…"]
    assert wrapped("y" * 30, 12, 2) == ["y" * 12, "y" * 11 + "…"]
    assert wrapped("", 12, 2) == []


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_text_and_every_line_stands_out_from_its_ground(scheme: Scheme) -> None:
    grounds = [scheme.paper, scheme.band, *(shade.fill for shade in scheme.states.values())]

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert set(scheme.states) == set(StageState)
    for ground in grounds:
        assert contrast(scheme.text, ground) >= 4.5
        assert contrast(scheme.faint, ground) >= 4.5
    for shade in scheme.states.values():
        assert contrast(scheme.on_ink, shade.ink) >= 4.5
        assert contrast(shade.ink, scheme.paper) >= 3
        assert contrast(shade.ink, shade.fill) >= 3
    assert contrast(scheme.line, scheme.paper) >= 3


def test_states_are_told_apart_without_colour() -> None:
    assert set(SIGNS) == set(StageState)
    shared = [state for state in StageState if list(SIGNS.values()).count(SIGNS[state]) > 1]
    assert shared == [StageState.COMPENSATING, StageState.UNDONE]
    svg = three_stages().to_svg()
    assert ".saga-compensating .saga-face{stroke-dasharray" in svg
    assert ".saga-undone .saga-face{stroke-dasharray" not in svg


def test_a_picture_needs_nothing_but_itself() -> None:
    for text in (three_stages().to_svg(), three_stages().to_svg("timeline"), three_stages().to_html()):
        outside = set(re.findall(r"(?:https?:)?//[^\"'\s<]+", text)) - {"http://www.w3.org/2000/svg"}
        assert outside == set()
        assert "@import" not in text
        assert "url(" not in text
        assert "<script" not in text


def test_the_same_report_gives_the_same_pictures() -> None:
    report = many_stages(60)
    again = SagaReport.model_validate_json(report.model_dump_json())

    assert again.to_svg() == report.to_svg()
    assert again.to_svg("timeline") == report.to_svg("timeline")
    assert again.to_html() == report.to_html()
    assert again.to_mermaid() == report.to_mermaid()


def test_a_view_that_there_is_not_is_refused() -> None:
    with pytest.raises(MisuseError, match="expected view to be 'graph' or 'timeline', got 'gantt'"):
        three_stages().to_svg("gantt")  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [{}, {"a": {"state": "kept"}, "b": {"state": "not_run"}}], ids=["no stage", "an old report"])
def test_a_report_that_knows_little_is_drawn_all_the_same(stages: dict[str, Any]) -> None:
    report = SagaReport.model_validate({"saga_id": "s", "pipeline": "p", "status": "completed", "started_at": BEGIN, "stages": stages})

    assert len(groups(report.to_svg())) == len(stages)
    assert [text for text in texts(parsed(report.to_svg("timeline"))) if text in stages] == list(stages)
    assert all(name in report.to_html() for name in stages)
    assert report.to_mermaid().count(":::") == len(stages)


# -- the timeline --------------------------------------------------------------------------------------------------


def bars(report: SagaReport) -> dict[str, tuple[str, float, float]]:
    """Each attempt by its hint: what it looks like, where it begins and how wide it is."""
    found = {}
    for hint, group in groups(report.to_svg("timeline")).items():
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        found[hint] = ((group.get("class") or "").removeprefix("saga-"), float(rect.get("x") or 0), float(rect.get("width") or 0))
    return found


def test_the_timeline_has_a_bar_for_each_attempt_in_both_directions() -> None:
    assert {hint: look for hint, (look, _, _) in bars(three_stages()).items()} == {
        "reserve_seat, attempt 1: kept, 420.0 ms": "kept",
        "reserve_room, attempt 1: kept, 309.0 ms": "kept",
        "charge_card, attempt 1: failed, 189.0 ms; limit exceeded": "failed",
        "charge_card, attempt 2: failed, 160.0 ms; the card was declined": "failed",
        "reserve_room, attempt 1: undone, 177.0 ms": "undone",
        "reserve_seat, attempt 1: undone, 266.0 ms": "undone",
    }


def test_bars_are_as_long_as_their_attempts_and_begin_when_they_did() -> None:
    found = list(bars(three_stages()).values())

    (_, seat, wide), (_, _, narrow), (_, first, tried), (_, second, last), *_ = found
    assert seat == 0
    assert wide / narrow == pytest.approx(0.42 / 0.309, rel=1e-2)
    assert second - (first + tried) == pytest.approx(0.2 / 0.42 * wide, rel=1e-2)
    assert second + last == pytest.approx(560)


def test_forward_is_above_backward_and_each_begins_at_its_own_time() -> None:
    said = texts(parsed(three_stages().to_svg("timeline")))

    assert said.index("Forward") < said.index("from 2026-03-14 09:26:53.000 UTC") < said.index("Backward")
    assert said.index("Backward") < said.index("from 2026-03-14 09:26:53.973 UTC")
    assert [text for text in said if re.fullmatch(r"[\d.]+ ms|[\d.]+ s", text)][:5] == ["0 s", "0.2 s", "0.4 s", "0.6 s", "0.8 s"]
    assert said[said.index("Backward") :].index("1") < said[said.index("Backward") :].index("2")
    assert "549.0 ms, cause" in said


def test_a_saga_that_never_turned_back_has_one_direction() -> None:
    report = Story("p", {"a": ()}).done("a", 0, 1).ends(1, SagaStatus.COMPLETED).report

    assert "Backward" not in texts(parsed(report.to_svg("timeline")))


def test_a_long_idle_stretch_is_cut_and_says_how_long_it_was() -> None:
    story = Story("p", {"a": ()}).fails("a", 0, 1, "no", will_retry=True).fails("a", 7_201, 7_202, "no", attempt=2, will_retry=True)
    report = story.tell(7_202.5, StageStarted, stage="a", attempt=3).tell(7_203, StageCompleted, stage="a", output=StageOutput.ok()).report

    said = texts(parsed(report.to_svg("timeline")))
    (_, first, one), (_, second, two), (_, third, _) = bars(report).values()

    assert "+ 2 h 0 min" in said
    assert "2:00:02" in said
    assert one == pytest.approx(two)
    assert second - first - one == pytest.approx(34)
    assert third - second - two == pytest.approx(one / 2, abs=0.1)


def test_many_cuts_leave_half_of_the_room_and_not_all_of_them_have_words() -> None:
    story = Story("p", {"a": ()})
    for attempt in range(1, 31):
        story.fails("a", attempt * 100, attempt * 100 + 1, "no", attempt=attempt, will_retry=attempt < 30)
    report = story.ends(3_002, SagaStatus.HALTED).report

    assert sum(width for _, _, width in bars(report).values()) == pytest.approx(280, rel=0.1)
    assert 0 < texts(parsed(report.to_svg("timeline"))).count("+ 1 min 39 s") < 29


def test_attempts_that_took_no_time_are_seen() -> None:
    report = Story("p", {"a": (), "b": ()}).done("a", 0, 0).done("b", 0, 0).ends(0, SagaStatus.COMPLETED).report

    assert [width for _, _, width in bars(report).values()] == [3, 3]
    assert "0 s" in texts(parsed(report.to_svg("timeline")))


def test_a_clock_that_was_set_back_draws_no_bar_backward() -> None:
    report = Story("p", {"a": ()}).done("a", 0, 1).ends(1, SagaStatus.COMPLETED).report
    tries = tuple(each._replace(ended_at=moment(-5)) for each in report.stages["a"].tries)
    report = report.model_copy(update={"stages": {"a": replace(report.stages["a"], tries=tries)}})

    assert [width for _, _, width in bars(report).values()] == [3]


def test_failures_are_told_in_the_order_of_the_ledger_though_the_clock_was_set_back_in_their_midst() -> None:
    story = Story("p", {"a": ()}, policy=ContinueWithFallback()).fails("a", 1, 2, "declined")
    unhelpful = failure("a", "no other price", -3600).model_copy(update={"type": "shop.errors.NoPrice"})
    story.tell(-3600, FallbackFailed, stage="a", failure=unhelpful)
    story.turns_back(-3599).ends(-3598, SagaStatus.COMPENSATED)

    report = SagaReport.from_events(story.events)

    assert [each.message for each in report.failures] == ["declined", "no other price"]
    assert "its fallback failed: NoPrice: no other price" in str(report)
    assert ["declined" in part for part in report.to_html().split("<h4>Failure, ")[1:]] == [True, False]


def test_what_came_late_is_told_though_the_clock_was_set_back_behind_the_start_of_the_saga() -> None:
    story = Story("p", {"a": ()}).fails("a", 0, 1, "no answer", kind=FailureKind.TIMEOUT, in_doubt=True).ends(2, SagaStatus.HALTED)
    late = failure("a", "it completed late: settle it", -3_600, kind=FailureKind.LATE)
    story.tell(-3_600, StageProbed, stage="a", landed=None, failure=late, held=True).ends(-3_600, SagaStatus.HALTED)

    report = SagaReport.from_events(story.events)

    assert "it completed late: settle it" in str(report)


def test_a_probe_that_failed_is_told_of_though_the_clock_was_set_back_before() -> None:
    story = Story("p", {"a": ()}).fails("a", 0, 1, "no answer", kind=FailureKind.TIMEOUT, in_doubt=True)
    unanswered = failure("a", "the line is dead", -3_600, kind=FailureKind.COMPENSATION).model_copy(update={"of_probe": True})
    story.tell(-3_600, StageProbed, stage="a", landed=None, failure=unanswered).ends(-3_600, SagaStatus.HALTED)

    report = SagaReport.from_events(story.events)

    assert "its probe failed once: Unreachable: the line is dead" in str(report)


@pytest.mark.parametrize("context", [None, hooked()], ids=["alone", "under a hook"])
def test_the_deadline_of_a_saga_is_told_before_what_was_interrupted_for_it(context: PipelineContext | None) -> None:
    _, pipeline = scene({"a": ()}, {"a": Script("hang")})

    report = run(SagaCoordinator(FailFast(deadline=5)).run(pipeline, context))

    assert [each.kind for each in report.failures] == [FailureKind.TIMEOUT, FailureKind.INTERRUPTED]


@pytest.mark.parametrize(
    ("length", "tick"), [(30e-6, "5 µs"), (0.03, "5 ms"), (3, "0.5 s"), (50, "10 s"), (600, "100 s"), (6_000, "0:16:40")]
)
def test_the_axis_counts_in_a_unit_that_reads_well(length: float, tick: str) -> None:
    report = Story("p", {"a": ()}).done("a", 0, length).ends(length, SagaStatus.COMPLETED).report

    assert tick in texts(parsed(report.to_svg("timeline")))


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (0.0004, "0.4 ms"),
        (0.99999, "1.00 s"),
        (59.999, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3_599.9, "1 h 0 min"),
        (7_320, "2 h 2 min"),
        (-7_320, "-2 h 2 min"),  # it ended on a machine whose clock is behind
    ],
)
def test_a_duration_is_said_in_a_unit_that_reads_well(length: float, said: str) -> None:
    assert duration(length) == said


def test_attempts_look_like_how_they_ended() -> None:
    story = Story("p", dict.fromkeys(("timeout", "cancel", "running", "lost", "skip", "never"), ()))
    story.fails("timeout", 0, 1, "late", kind=FailureKind.TIMEOUT, in_doubt=True)
    story.fails("cancel", 0, 1, "stop", kind=FailureKind.CANCELLED)
    story.tell(0, StageStarted, stage="lost", attempt=1).tell(1, StageStarted, stage="lost", attempt=2)
    story.tell(2, StageCompleted, stage="lost", output=StageOutput.ok())
    story.tell(1, StageStarted, stage="running", attempt=1)
    story.tell(0, StageStarted, stage="skip", attempt=1)
    report = story.tell(1, StageSkipped, stage="skip", reason="nothing to do", output=StageOutput.skip("nothing to do")).report

    assert {hint.partition(":")[0]: look for hint, (look, _, _) in bars(report).items()} == {
        "timeout, attempt 1": "in_doubt",
        "cancel, attempt 1": "cancelled",
        "running, attempt 1": "running",
        "lost, attempt 1": "in_doubt",
        "lost, attempt 2": "kept",
        "skip, attempt 1": "skipped",
    }
    assert "not run" in texts(parsed(report.to_svg("timeline")))


def test_of_an_attempt_whose_process_was_lost_only_the_start_is_known() -> None:
    story = Story("p", {"a": ()}).fails("a", 0, 9_000, "its process is gone", kind=FailureKind.CRASHED, in_doubt=True, will_retry=True)
    story.tell(9_001, StageStarted, stage="a", attempt=2)
    report = story.tell(9_003, StageCompleted, stage="a", output=StageOutput.ok()).ends(9_003, SagaStatus.COMPLETED).report

    assert report.stages["a"].tries == ((moment(0), None, FailureKind.CRASHED), (moment(9_001), moment(9_003), None))
    lost, done = bars(report).items()
    assert lost[0] == "a, attempt 1: in doubt; its process is gone"
    assert lost[1][0] == "in_doubt"
    assert done[1][2] == pytest.approx(560 - 34)
    assert "failed (crashed)" in details(report, "a")


def test_the_timeline_goes_backward_in_the_order_of_undoing() -> None:
    report = twelve_stages()
    said = texts(parsed(report.to_svg("timeline")))
    backward = [words for words in said[said.index("Backward") :] if words in report.stages]

    assert backward == ["send_receipt", "print_label", "reserve_courier", "charge_card", "award_points"]


def test_how_long_an_attempt_took_is_not_said_when_nobody_knows() -> None:
    story = Story("p", {"a": (), "b": ("a",)}).done("a", 0, 1)
    alive = story.tell(1, StageStarted, stage="b", attempt=1).report
    gone = failure("b", "its process is gone", 9_000, kind=FailureKind.CRASHED)
    story.tell(9_000, StageFailed, stage="b", failure=gone, in_doubt=True)
    found = story.tell(9_001, StageProbed, stage="b", landed=True, output=StageOutput.ok()).ends(9_001, SagaStatus.COMPLETED).report

    for report, note in ((alive, "running"), (found, "kept")):
        drawn = texts(parsed(report.to_svg("timeline")))
        assert note in drawn[drawn.index("b") :]
        assert "0.0 ms" not in drawn
    assert "nobody knew whether it landed" in texts(parsed(found.to_svg("timeline")))


def test_a_stage_that_stands_after_all_is_no_part_of_the_way_back() -> None:
    story = Story("p", {"a": (), "b": ("a",)}).done("a", 0, 1).fails("b", 1, 2, "no").turns_back(2)
    story.undo_fails("a", 2, 3, "the bank does not answer").ends(3, SagaStatus.STUCK)
    story.tell(4, SagaResumed, forward=True, by="anna").done("b", 4, 5).ends(5, SagaStatus.COMPLETED)
    its = drawing(story.report)

    assert story.report.compensation_order == ("a",)
    assert [box.order for box in its.boxes] == [None, None]
    assert its.undoes == ()
    assert "undoing" not in its.description
    assert texts(parsed(story.report.to_svg("timeline"))).count("Backward") == 1


@pytest.mark.parametrize(
    ("ends", "state"), [(StageOutput.ok(), "kept"), (StageOutput.skip("no"), "skipped"), (StageOutput.fail("no"), "failed")]
)
def test_a_stage_that_passes_over_what_a_saga_of_its_own_left_standing_hides_it_from_nobody(ends: StageOutput, state: str) -> None:
    _, inner = scene(SEQUENCE, {"a": Script(undo_fails=99), "b": Script("raise")})

    async def careless(ctx: Any) -> StageOutput:
        await ctx.run_saga(inner)
        return ends

    report = run(SagaCoordinator().run(Pipeline(name="outer").with_stage("book", careless, "work"), saga_id="s"))
    (box,) = drawing(report).boxes

    assert report.stages["book"].state == state
    assert box.label.startswith(f"{state} · trouble within")
    for shown in (box.hint, str(report), details(report, "book")):
        assert "something of its saga s/book is stuck, blocked or in doubt" in shown


def test_an_undoing_that_a_probe_found_to_have_landed_has_no_end_of_its_own() -> None:
    story = Story("p", {"a": (), "b": ("a",)}).done("a", 0, 1).fails("b", 1, 2, "no").turns_back(2)
    story.tell(2, CompensationStarted, stage="a", attempt=1)
    report = story.tell(3, StageProbed, stage="a", landed=False).ends(3, SagaStatus.COMPENSATED).report

    assert report.stages["a"].state is StageState.UNDONE
    assert bars(report)["a, attempt 1: in doubt"][0] == "in_doubt"


def test_a_later_failure_does_not_end_an_attempt_again_whose_process_was_lost() -> None:
    story = Story("p", {"a": ()}).fails("a", 0, 5, "its process is gone", kind=FailureKind.CRASHED, will_retry=True)
    report = story.tell(9, StageFailed, stage="a", failure=failure("a", "called off", 9)).report

    assert report.stages["a"].tries == ((moment(0), None, FailureKind.CRASHED),)


def test_an_attempt_ends_when_its_outcome_is_known_and_not_when_a_fallback_a_probe_or_a_wait_is_over() -> None:
    story = Story("p", {"a": ()}, policy=ContinueWithFallback()).fails("a", 0, 1, "no")
    fell_back = story.tell(9, FallbackUsed, stage="a", output=StageOutput.ok(), source="stage").ends(9, SagaStatus.DEGRADED).report
    story = Story("p", {"a": ()}).fails("a", 0, 1, "late", kind=FailureKind.TIMEOUT, in_doubt=True)
    probed = story.tell(9, StageProbed, stage="a", landed=True, output=StageOutput.ok()).ends(9, SagaStatus.COMPLETED).report

    story = Story("p", {"a": ()}).fails("a", 0, 1, "no", will_retry=True)
    called_off = story.tell(9, StageFailed, stage="a", failure=failure("a", "no", 1)).ends(9, SagaStatus.COMPENSATED).report

    for report, kind in ((called_off, FailureKind.EXCEPTION), (fell_back, FailureKind.EXCEPTION), (probed, FailureKind.TIMEOUT)):
        assert report.stages["a"].tries == ((moment(0), moment(1), kind),)
        assert report.stages["a"].ended_at == moment(9)


def _by_length(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of JSON as a jsonb of PostgreSQL's sorts them."""
    return dict(sorted(pairs, key=lambda pair: (len(pair[0]), pair[0])))


def test_a_report_is_drawn_also_if_what_kept_its_json_has_put_the_stages_in_another_order() -> None:
    _, pipeline = scene({"first": (), "then": ("first",), "end": ("then",)}, {"end": Script("raise")})
    report = run(SagaCoordinator().run(pipeline))
    kept = json.loads(report.model_dump_json(), object_pairs_hook=_by_length)

    again = SagaReport.model_validate_json(json.dumps(kept))

    assert [*kept["stages"]] == ["end", "then", "first"]
    assert [*again.stages] == ["first", "then", "end"]
    assert again == report
    assert again.to_html() == report.to_html()
    assert again.to_svg("timeline") == report.to_svg("timeline")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dependencies": ["lost"]}, "expected dependencies out of the pipeline's stages (a, b, c), for stage 'b', got 'lost'"),
        ({"dependencies": ["a", "c"]}, "expected dependencies without a cycle, for stage 'b', got b -> c -> b"),
    ],
)
def test_what_is_no_graph_is_refused_in_the_json_of_a_report(change: dict[str, Any], why: str) -> None:
    report = run(SagaCoordinator().run(scene(SEQUENCE)[1])).model_dump(mode="json")
    report["stages"]["b"] |= change

    with pytest.raises(ValidationError) as refused:
        SagaReport.model_validate_json(json.dumps(report))

    assert [error["msg"] for error in refused.value.errors()] == [f"Value error, {why}"]


def test_an_order_of_undoing_that_names_no_stage_is_refused_in_the_json_of_a_report() -> None:
    report = run(SagaCoordinator().run(scene(SEQUENCE)[1])).model_dump(mode="json") | {"compensation_order": ["a", "lost"]}

    with pytest.raises(ValidationError, match="expected stages of the report, got 'lost'"):
        SagaReport.model_validate_json(json.dumps(report))


def test_a_report_knows_each_attempt_and_each_dependency_also_after_json() -> None:
    report = twelve_stages()
    again = SagaReport.model_validate_json(report.model_dump_json())

    assert again.stages["charge_card"].dependencies == ("authorise_card", "reserve_stock")
    undo = again.stages["charge_card"].compensation
    assert undo is not None
    assert [each.ended_at - each.started_at for each in undo.tries if each.ended_at] == [timedelta(seconds=0.4)] * 3
    assert {each.failed for each in undo.tries} == {FailureKind.COMPENSATION}
    assert again.stages["archive_order"].dependencies == ("hand_over", "send_receipt")
    assert again.stages["archive_order"].tries == ()


def test_a_compensation_that_runs_is_drawn_as_far_as_it_has_come() -> None:
    story = Story("p", {"a": (), "b": ("a",)}).done("a", 0, 1).fails("b", 1, 2, "no").turns_back(2)
    report = story.tell(2, CompensationStarted, stage="a", attempt=1).report

    assert bars(report)["a, attempt 1: compensating"][0] == "compensating"


# -- mermaid -------------------------------------------------------------------------------------------------------


def test_mermaid_has_the_stages_the_arrows_there_and_back_and_their_order() -> None:
    assert three_stages().to_mermaid() == (
        '---\ntitle: "book_trip: compensated after 1.24 s"\n---\nflowchart LR\n'
        '  s0["#60;#160;reserve_seat<br/>undone #183; 420.0 ms<br/>undoing, number 2"]:::undone\n'
        '  s1["#60;#160;reserve_room<br/>undone #183; 309.0 ms<br/>undoing, number 1"]:::undone\n'
        '  s2["x#160;charge_card<br/>failed#58; the card was declined<br/>the cause"]:::failed\n'
        "  s0 --> s2\n  s1 --> s2\n  s0 -.-|← 2| s2\n  s1 -.-|← 1| s2\n"
        "  classDef failed fill:#fdecec,stroke:#c01c28,color:#1f2328\n"
        "  classDef undone fill:#f3edfc,stroke:#7a3fc7,color:#1f2328\n"
        "  linkStyle 2,3 stroke:#7a3fc7\n"
    )


def test_mermaid_shows_where_the_way_back_begins_and_where_it_only_passes() -> None:
    assert "  s10 -.->|1| s10\n" in twelve_stages().to_mermaid()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")}, {"b": "plain"})
    assert "  s1 -.-|←| s2\n" in run(SagaCoordinator().run(pipeline)).to_mermaid()


def test_no_stage_in_mermaid_begins_like_an_item_of_a_list() -> None:
    """Mermaid 11 takes a label for Markdown, and shows "Unsupported markdown: list" in place of the stage."""
    story = Story("signs", {"a": (), "b": ("a",)}).done("a", 0, 1)
    shown = story.tell(1, StageSkipped, stage="b", reason="no need", output=StageOutput.skip("no need")).report.to_mermaid()

    assert 's0["#43;#160;a<br/>' in shown
    assert 's1["-#160;b<br/>' in shown


MERMAID = re.compile(
    r'---\ntitle: "(?:[^"\\\n]|\\.)*"\n---\nflowchart LR\n'
    r"""(?:  s\d+\["(?:[\w ,.()'!?-]|#\d+;|<br/>)*"\]:::\w+\n)+"""
    r"(?:  s\d+ --> s\d+\n|  s\d+ -\.-\|← ?\d*\| s\d+\n|  s\d+ -\.->\|\d+\| s\d+\n)*"
    r"(?:  classDef \w+ fill:#\w+,stroke:#\w+,color:#\w+\n)+"
    r"(?:  linkStyle [\d,]+ stroke:#\w+\n)?"
)


def test_mermaid_holds_nothing_but_plain_letters_and_numbered_characters(report: SagaReport) -> None:
    text = report.to_mermaid()
    text.encode()

    assert MERMAID.fullmatch(text)
    assert not re.search("[ﬂß]", text.partition("flowchart")[2])
    assert len(text) < 50_000


def test_a_title_in_mermaid_is_what_yaml_can_hold() -> None:
    """YAML refuses a text with a control character above 127, and Mermaid with it the whole diagram."""
    report = three_stages().model_copy(update={"pipeline": 'a\x9b\u202e "trip"'})

    title = report.to_mermaid().splitlines()[1].removeprefix("title: ")

    assert title.isprintable()
    assert json.loads(title) == 'a\x9b\u202e "trip": compensated after 1.24 s'


def test_a_graph_with_too_many_arrows_for_mermaid_keeps_the_forward_ones_and_the_order() -> None:
    text = fan(250).to_mermaid()

    assert text.count("-->") == 500
    assert "-.-" not in text
    assert "linkStyle" not in text
    assert text.count("undoing, number") == 251


# -- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page consists of; elements that are left open, or closed out of order, are an error."""

    VOID = frozenset({"meta", "br", "rect", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str, attribute: str) -> list[str | None]:
        return [attributes[attribute] for name, attributes in self.elements if name == tag and attribute in attributes]


def test_a_page_is_well_formed_and_every_link_leads_somewhere_in_it(report: SagaReport) -> None:
    text = report.to_html()
    text.encode()
    page = Page(text)

    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = page.all("a", "href")
    assert len(ids) == len(set(ids))
    assert {str(link).removeprefix("#") for link in links} <= set(ids)
    assert page.all("html", "lang") == ["en"]
    assert [tag for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)][:6] == ["h1", "h2", "h2", "h2", "h2", "h3"]
    assert sum(tag == "h3" for tag, _ in page.elements) == len(report.stages)


def test_a_page_has_the_table_with_a_caption_and_headings_of_columns_and_rows() -> None:
    page = Page(twelve_stages().to_html())

    assert page.words["caption"] == ["The 12 stages, each after those that it depends on"]
    assert page.all("th", "scope") == ["col"] * 6 + ["row"] * 12
    assert page.words["th"] == ["Stage", "State", "Attempts", "Time", "Undoing", "What happened"]
    assert "1.30 s" in page.words["td"]
    assert "its compensation failed 3 times, the last: Unreachable: the bank does not answer" in page.words["bdi"]


def test_a_page_of_one_stage_does_not_count_stages() -> None:
    html = Story("seat", {"reserve_seat": ()}).done("reserve_seat", 0, 1).ends(1, SagaStatus.COMPLETED).report.to_html()

    assert Page(html).words["caption"] == ["The only stage"]
    assert "1 stage" in html
    assert "1 stages" not in html


def test_every_stage_of_the_graph_and_of_the_table_is_a_link_to_its_details() -> None:
    report = twelve_stages()
    page = Page(report.to_html())

    anchors = [f"#stage-{place}" for place in range(1, 13)]
    assert [link for link in page.all("a", "href") if str(link).startswith("#stage-")][: 2 * 12] == anchors * 2
    names = [label for label in page.all("a", "aria-label") if label]
    assert [name.partition(":")[0] for name in names] == list(report.stages)


def test_a_page_says_first_how_the_saga_stands_why_and_what_to_do() -> None:
    header = twelve_stages().to_html().partition("<main>")[0].partition("<body>")[2]
    words = " ".join(re.sub("<[^>]*>", " ", header).split())

    assert words.startswith(
        "Skip to the table of stages fulfil_order ! stuck after 7.95 s Cause: stage &#x27;hand_over&#x27; raised: "
        "CardDeclined: the depot is closed &amp; nobody answers the door Still in effect, its undoing failed: charge_card."
    )
    assert "Saga 7f3a , started 2026-03-14 09:26:53.000 UTC , ended 2026-03-14 09:27:00.950 UTC" in words


def details(report: SagaReport, name: str) -> str:
    anchor = f'id="stage-{list(report.stages).index(name) + 1}"'
    part = report.to_html().partition(anchor)[2].partition("</details>")[0]
    return " ".join(re.sub("<[^>]*>", " ", part).replace("&quot;", '"').replace("&#x27;", "'").split())


def test_the_details_hold_attempts_failures_and_the_output_as_json() -> None:
    said = details(twelve_stages(), "charge_card")

    assert "Depends on authorise_card , reserve_stock Order of undoing number 4 of 5" in said
    assert "Attempts 2026-03-14 09:26:55.600 UTC , 1.50 s, completed" in said
    assert "Attempts to undo it 2026-03-14 09:26:58.200 UTC , 400.0 ms, failed (compensation)" in said
    assert 'Output { "id": "charge_card-1" }' in said
    assert "stage 'charge_card' could not be compensated at attempt 3: Unreachable: the bank does not answer" in said


def test_the_details_hold_effects_tracebacks_and_the_failures_of_a_nested_saga() -> None:
    story = Story("p", {"hotel": (), "inn": ()})
    story.tell(0, StageStarted, stage="hotel", attempt=1).tell(0.5, EffectRecorded, stage="hotel", effect={"room": 7})
    report = story.fails("inn", 0, 1, "no").report
    inside = failure("hotel/deposit", "declined", 0.7).model_copy(update={"traceback": "Traceback: <line>"})
    other = failure("hotelier", "not mine", 0.8)
    report = report.model_copy(update={"failures": (*report.failures, inside, other, failure(None, "deadline", 0.9))})

    said = details(report, "hotel")

    assert 'Effects [ { "room": 7 } ]' in said
    assert "stage 'hotel/deposit' raised: CardDeclined: declined Traceback: &lt;line&gt;" in said
    assert "no outcome recorded" in said
    assert "not mine" not in said
    assert "Output" not in said
    assert "deadline" not in said


def test_the_details_do_not_take_a_probe_without_an_answer_for_a_compensation_that_failed() -> None:
    story = Story("p", {"pay": ()}).fails("pay", 0, 1, "no answer within 1 s", kind=FailureKind.TIMEOUT, in_doubt=True)
    silent = failure("pay", "the bank is closed", 1.5, attempt=2, kind=FailureKind.COMPENSATION).model_copy(update={"of_probe": True})
    report = story.tell(1.5, StageProbed, stage="pay", landed=None, failure=silent).ends(2, SagaStatus.STUCK).report

    said = details(report, "pay")

    assert "stage 'pay' could not be asked at attempt 2: Unreachable: the bank is closed" in said
    assert "could not be compensated" not in said


def test_the_details_hold_the_sagas_within_and_what_came_late() -> None:
    report = Story("p", {"hotel": ()}).fails("hotel", 0, 1, "late", kind=FailureKind.TIMEOUT, in_doubt=True).report
    stage = replace(report.stages["hotel"], children=(three_stages(),), late_output=StageOutput.ok(room=9))

    said = details(report.model_copy(update={"stages": {"hotel": stage}}), "hotel")

    assert "it completed late, when it had been given up" in said
    assert 'Output that came late { "room": 9 }' in said
    assert "Saga within Saga 7f3a (book_trip): COMPENSATED after 1.24 s Cause: stage 'charge_card' raised" in said


def test_what_to_call_next_stands_out_as_code() -> None:
    header = twelve_stages().to_html().partition("<main>")[0]

    assert "<p><code><bdi>saga settle 7f3a charge_card undone" in header


def nest(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"deeper": value}
    return value


class LowersTheLimit:
    """Makes the stack too short for whoever writes JSON afterwards, as a deep output can."""

    def __repr__(self) -> str:
        frame, depth = sys._getframe(), 0
        while frame.f_back:
            frame, depth = frame.f_back, depth + 1
        sys.setrecursionlimit(depth + 12)
        return "LowersTheLimit()"


def with_output(value: Any) -> SagaReport:
    return Story("p", {"a": ()}).done("a", 0, 1, value=value).ends(1, SagaStatus.COMPLETED).report


@pytest.mark.parametrize("depth", [200, 300, 480, 950, 3_000])
def test_an_output_of_any_depth_is_shown(depth: int) -> None:
    shown = details(with_output(nest(depth)), "a")

    assert "deeper" in shown or "nested too deeply" in shown


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="C code, which writes the JSON, has a limit of its own there")
def test_an_output_that_the_stack_is_too_short_to_write_says_so() -> None:
    limit = sys.getrecursionlimit()
    report = with_output([nest(30), LowersTheLimit()])

    try:
        text = report.to_html()
    finally:
        sys.setrecursionlimit(limit)

    assert "nested too deeply to be shown" in text


def test_a_huge_output_is_cut_and_says_how_much_more_there_was() -> None:
    said = details(with_output("z" * 60_000), "a")

    assert len(said) < 52_000
    assert "… and 10,017 more characters" in said


def test_a_page_lets_nothing_run_or_load_whatever_it_holds() -> None:
    page = Page(hostile().to_html())

    (policy,) = (attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert {tag for tag, _ in page.elements} & {"script", "img", "iframe", "object", "link", "form"} == set()
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_hostile_names_and_errors_are_on_the_page_word_for_word() -> None:
    page = Page(hostile().to_html())

    words = {printable(word) for word in page.words["bdi"]}
    assert {printable(name) for name in HOSTILE} <= words


def test_what_would_end_the_isolation_of_somebodys_words_is_on_the_page_as_its_code() -> None:
    page = Page(three_stages().model_copy(update={"saga_id": "s\u2069\u202ex \u2066y"}).to_html())

    assert "s\\u2069\u202ex \\u2066y" in page.words["bdi"]


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_of_the_docs_are_what_is_drawn_today(name: str) -> None:
    kept = (Path(__file__).parent.parent / "docs" / "pictures" / name).read_text(encoding="utf-8")

    assert kept == PICTURES[name]() + "\n", "draw them anew: make pictures"


# -- in a notebook -------------------------------------------------------------------------------------------------


def test_a_notebook_gets_the_picture_and_can_choose_its_form() -> None:
    report = three_stages()

    bundle = report._repr_mimebundle_(include=None, exclude=None)

    assert bundle == {"text/plain": str(report), "image/svg+xml": report.to_svg(), "text/html": report._repr_html_()}
    assert report.to_svg() in report._repr_html_()
    assert "<html" not in report._repr_html_()
