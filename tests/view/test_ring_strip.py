"""The strip of a film: what stands in it, what is refused, and its files."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb
from vblklab.view.ring_panel import PANEL_WIDTH, panel, svg

QUEUES = {"split": vb.Split(8), "packed": vb.Packed(8), "large": vb.Split(256), "large-packed": vb.Packed(200)}


@pytest.fixture(scope="module", params=QUEUES)
def film(request: pytest.FixtureRequest) -> vb.Film:
    app = vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=30)
    recipe = vb.Pipeline(app=app, queue=QUEUES[request.param], device=vb.VirtioBlkDevice(indirect="large" in request.param))
    return vb.film(recipe.boot(vb.SimMachine()), steps=2000)


def texts_of(figure: Any) -> list[str]:
    return [text for trace in figure.data for text in trace.text or ()]


def test_a_strip_shows_the_words_of_its_frames(film: vb.Film) -> None:
    figure = film.strip([1, 2])
    texts = texts_of(figure)
    assert any("frame 1 of" in text for text in texts) and any("frame 2 of" in text for text in texts)
    split, packed = ("descriptor table", "used_event", "avail_event"), ("descriptor ring", "driver's event", "AVAIL")
    for name in packed if film[0].shot.packed else split:
        assert sum(name in text for text in texts) >= 2
    assert f"{film[1].shot.value('desc', 'addr', 0):#x}" in "".join(texts)


def test_everything_lies_inside_the_panel_and_no_two_cells_overlap(film: vb.Film) -> None:
    for number in range(len(film)):
        drawn = panel(film, number)
        for box in drawn.boxes:
            assert box.x >= 0 and box.x + box.width <= PANEL_WIDTH + 0.5 and box.y >= 0 and box.y + box.height <= drawn.height
        spans: dict[float, list[tuple[float, float]]] = {}
        for text in drawn.texts:
            if text.mono:
                width = 7.2 * len(text.text)
                left = text.x - width if text.anchor == "end" else text.x
                spans.setdefault(text.y, []).append((left, left + width))
        for row in spans.values():
            row.sort()
            assert all(one[1] <= two[0] + 4 for one, two in itertools.pairwise(row))


def test_states_are_told_by_more_than_colour(film: vb.Film) -> None:
    boxes = panel(film, 1).boxes
    assert any(box.dashed for box in boxes), "what is not published has a dashed chip"
    names = {text.text for text in panel(film, 2).texts}
    assert "r1" in names
    assert any(text.bold and text.mono for text in panel(film, 2).texts), "what has changed is bold and framed"


def test_the_svg_of_a_frame_is_well_formed_and_small(film: vb.Film) -> None:
    from xml.etree import ElementTree

    drawn = panel(film, len(film) - 1)
    text = svg([(drawn, 0)], drawn.height)
    root = ElementTree.fromstring(text)
    assert root.get("height") == f"{drawn.height:g}" and len(text) < 40_000


def test_the_files_of_a_strip(film: vb.Film, tmp_path: Path) -> None:
    vb.export(film.strip([1, 2]), tmp_path / "ring.html")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "ring.csv").read_text(encoding="utf-8"))))
    published = [row for row in rows if row["frame"] == "2" and row["changed"] == "True"]
    assert published and {row["label"] for row in published} == {"virtqueue_kick_prepare"}
    told = (tmp_path / "ring.txt").read_text(encoding="utf-8")
    assert "SimMachine(seed=1)" in told and "cost table" in told


@pytest.mark.parametrize("frames", [[], "12", list(range(13)), 1.5, {1, 2}])
def test_frames_that_cannot_be_drawn_are_refused(frames: Any) -> None:
    film = vb.film(vb.Pipeline(queue=vb.Split(8)).boot(vb.SimMachine()), steps=30)
    with pytest.raises(vb.ConfigError, match="give 1 to 12"):
        film.strip(frames)


def test_a_strip_of_a_list_needs_no_run() -> None:
    film = vb.film(vb.Pipeline(queue=vb.Split(8)).boot(vb.SimMachine()), steps=60)
    again = vb.film([(frame.label, frame.shot) for frame in film], title="a schedule: 2 steps")
    assert texts_of(again.strip(1)) and again.strip().layout.title.text.startswith("<b>A schedule")
