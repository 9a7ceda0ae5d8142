"""The pictures of an explanation: what is undone, kept and impossible to undo if a stage fails."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from saga import ContinueWithFallback, MisuseError, StageState
from saga.lint import Explanation
from saga.render.drawing import Drawing
from saga.render.explained import drawing_if
from tests.stories import chain_thought_of, thought_of

S = StageState


def states(drawing: Drawing) -> dict[str, StageState]:
    return {box.name: box.state for box in drawing.boxes}


def test_each_stage_is_shown_as_the_failure_leaves_it() -> None:
    assert states(drawing_if(thought_of(), "hand_over")) == {
        "load": S.KEPT,
        "stock": S.UNDONE,
        "courier": S.UNDONE,
        "letter": S.STUCK,
        "price": S.KEPT,
        "charge": S.UNDONE,
        "hand_over": S.FAILED,
        "receipt": S.NOT_RUN,
    }


def test_what_is_undone_at_the_same_time_has_the_same_number() -> None:
    drawing = drawing_if(thought_of(), "hand_over")

    assert {box.name: box.order for box in drawing.boxes if box.order} == {"charge": 1, "stock": 2, "courier": 2}
    assert [box.name for box in drawing.boxes if box.is_cause] == ["hand_over"]


def test_the_way_back_leads_from_the_failure_through_stages_without_an_effect() -> None:
    assert {("hand_over", "charge"), ("charge", "price"), ("price", "stock"), ("price", "courier")} < set(
        drawing_if(thought_of(), "hand_over").undoes
    )


def test_a_fallback_stands_in_and_nothing_leads_back() -> None:
    drawing = drawing_if(thought_of(ContinueWithFallback(fallbacks={"price": {}})), "price")

    assert states(drawing)["price"] is S.FALLBACK
    assert set(states(drawing).values()) == {S.KEPT, S.FALLBACK}
    assert drawing.undoes == ()
    assert [box.label for box in drawing.boxes if box.is_cause] == ["fails, its fallback stands in"]


def test_a_skipped_branch_leads_back_to_what_served_it_alone() -> None:
    drawing = drawing_if(thought_of(ContinueWithFallback(without_fallback="skip_branch")), "courier")

    assert states(drawing)["price"] is states(drawing)["hand_over"] is S.SKIPPED
    assert states(drawing)["stock"] is S.UNDONE
    assert ("price", "stock") in drawing.undoes


def test_the_picture_says_in_words_what_it_shows() -> None:
    assert drawing_if(thought_of(), "hand_over").description == (
        "if hand_over fails: compensated. Not run: receipt. Kept: load, price. Fails: hand_over. Undone: stock, courier, charge. "
        "Impossible to undo: letter. Order of undoing: charge, courier, stock."
    )


def test_an_svg_is_well_formed_and_has_a_legend_that_fits_what_is_only_thought_of() -> None:
    svg = thought_of().to_svg("hand_over")

    ET.fromstring(svg)  # noqa: S314 - our own
    assert ">impossible to undo</text>" in svg
    assert ">stuck</text>" not in svg


def test_mermaid_has_the_order_in_the_boxes() -> None:
    text = thought_of().to_mermaid("hand_over")

    assert 'title: "fulfil_order: if hand_over fails: compensated"' in text
    assert "courier<br/>undone<br/>undoing, number 2" in text


@pytest.mark.parametrize("draw", [Explanation.to_svg, Explanation.to_mermaid])
def test_a_stage_that_is_not_there_is_refused(draw: Any) -> None:
    with pytest.raises(MisuseError, match=r"expected a stage of pipeline fulfil_order \(load, .*\), got 'handover'"):
        draw(thought_of(), "handover")


def test_the_page_has_a_picture_for_each_stage_each_with_a_way_to_every_other_one() -> None:
    html = thought_of().to_html()

    assert len(re.findall("<svg", html)) == len(thought_of().stages)
    for place in range(1, 9):
        assert f'<section id="if-{place}">' in html
        assert html.count(f'href="#if-{place}"') == 1 + 8


def test_the_page_of_a_large_pipeline_has_words_alone() -> None:
    html = chain_thought_of(f"s{number}" for number in range(101)).to_html()

    assert "<svg" not in html
    assert html.count("<section") == 101
