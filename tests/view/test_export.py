"""Figures as files: pictures where there is a browser, and always a page, the numbers and their origin."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from tests.peers import chromium
from vblklab.errors import ConfigError
from vblklab.view import compare, export, lanes, latency, path_map, waterfall

from .fake_run import COST_TABLE, live_run, sim_run

SIM, LIVE = sim_run(), live_run()
ALWAYS = {".html", ".csv", ".txt"}


@pytest.fixture
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kaleido meets on a machine without Chrome."""
    monkeypatch.setenv("BROWSER_PATH", "/there/is/no/browser")


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_without_a_browser_everything_else_is_written_and_one_line_says_how_to_get_pictures(tmp_path: Path, no_browser: None) -> None:
    out = export(waterfall(SIM), tmp_path / "fig.png", SIM)
    assert {path.suffix for path in out.files} == ALWAYS == {path.suffix for path in tmp_path.iterdir()}
    assert out.message.startswith("no PNG: there is no Chrome or Chromium here;")
    assert "chromium" in out.message
    assert "\n" not in out.message
    assert out.message in str(out)


def test_a_path_without_suffix_asks_for_all_pictures(tmp_path: Path, no_browser: None) -> None:
    out = export(path_map(SIM), str(tmp_path / "map"))
    assert out.message.startswith("no PNG, SVG, PDF:")
    assert {path.name for path in out.files} == {"map.html", "map.csv", "map.txt"}


def test_html_asks_for_no_browser(tmp_path: Path, no_browser: None) -> None:
    out = export(path_map(), tmp_path / "map.html")
    assert out.message == ""
    assert {path.suffix for path in out.files} == ALWAYS


def test_export_writes_over_its_own_files(tmp_path: Path) -> None:
    export(waterfall(SIM), tmp_path / "a.html")
    first = (tmp_path / "a.csv").read_text(encoding="utf-8")
    export(waterfall(LIVE), tmp_path / "a.html")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") != first


@pytest.mark.parametrize(("name", "said"), [
    ("fig.gif", r"use \.png, \.svg, \.pdf or \.html"), ("no/folder/fig.png", "there is no folder"), ("", "give a file name"),
    ("nvme-v1.2", r"use \.png"),
])
def test_a_wrong_path_is_a_config_error_and_writes_nothing(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        export(waterfall(SIM), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_something_that_is_no_run_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot draw a int"):
        export(waterfall(SIM), tmp_path / "a.html", 7)  # type: ignore[arg-type]


def test_csv_of_a_waterfall_is_enough_to_draw_it_again(tmp_path: Path) -> None:
    export(waterfall(LIVE, request=3, unit="ns"), tmp_path / "w.html")
    rows = _rows(tmp_path / "w.csv")
    assert list(rows[0])[:8] == ["trace", "point", "x", "x_unit", "y", "y_unit", "base", "text"]
    assert len(rows) == 30  # 15 steps, each in two parts
    whole: dict[str, float] = {}
    for row in rows:
        whole[row["step"]] = whole.get(row["step"], 0) + float(row["x"])
        assert row["x_unit"] == "ns"
        assert row["part"] in ("kernel and hardware", "Python")
    assert list(whole.values()) == pytest.approx(np.diff(LIVE.rows[3]))


@pytest.mark.parametrize("fig", [
    path_map(SIM), waterfall(SIM, LIVE), lanes(SIM), latency(SIM), latency(LIVE, kind="histogram"), compare(SIM, LIVE),
], ids=["path_map", "waterfall", "lanes", "latency", "histogram", "compare"])
def test_csv_has_plain_numbers_units_and_no_decoration(tmp_path: Path, fig: Any) -> None:
    export(fig, tmp_path / "f.html")
    text = (tmp_path / "f.csv").read_text(encoding="utf-8")
    assert "bdata" not in text
    assert "dtype" not in text
    assert "<br>" not in text
    rows = _rows(tmp_path / "f.csv")
    assert rows
    for row in rows:
        float(row["x"])
        float(row["y"])
        assert row["x_unit"] and row["y_unit"] and row["trace"]
        assert not any("customdata" in name for name in row)


def test_csv_unpacks_what_plotly_packed_as_base64(tmp_path: Path) -> None:
    packed = json.loads(go.Figure(go.Scatter(x=np.array([1.5, 2.5]), y=np.array([3, 4]))).to_json())
    assert "bdata" in packed["data"][0]["x"]
    export(go.Figure(packed, skip_invalid=True), tmp_path / "f.html")
    assert [(row["x"], row["y"]) for row in _rows(tmp_path / "f.csv")] == [("1.5", "3"), ("2.5", "4")]


def test_txt_holds_caption_and_full_provenance_with_or_without_the_run(tmp_path: Path) -> None:
    export(waterfall(SIM, LIVE), tmp_path / "a.html")
    export(waterfall(SIM, LIVE), tmp_path / "b.html", (SIM, LIVE))
    text = (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.txt").read_text(encoding="utf-8")
    for part in (COST_TABLE, "granularity: 71 trace points declared", "this machine has no trap", "Fio(rw='randread'", "L2 live"):
        assert part in text


def test_txt_of_a_foreign_figure_says_that_its_origin_is_not_recorded(tmp_path: Path) -> None:
    export(go.Figure(go.Bar(x=[1], y=[2])), tmp_path / "a.html")
    assert "not recorded" in (tmp_path / "a.txt").read_text(encoding="utf-8")


def test_html_holds_plotly_and_provenance_and_links_to_nothing(tmp_path: Path) -> None:
    export(waterfall(SIM), tmp_path / "w.html")
    page = (tmp_path / "w.html").read_text(encoding="utf-8")
    assert len(page) > 3_000_000, "plotly.js is inside"
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", re.sub(r"(<script\b[^>]*>).*?</script>", r"\1", page, flags=re.S))
    assert tags
    assert not any(re.search(r"\b(src|href)\s*=", tag) for tag in tags)
    assert COST_TABLE in page
    assert "<title>Where the time of one I/O goes</title>" in page


def test_kaleidos_page_gets_a_local_empty_mathjax_and_the_users_setting_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def write(figs: Any, files: list[Path], **_: Any) -> None:
        at = str(pio.defaults.mathjax)
        assert at.startswith("file:")
        seen.append(Path(at.removeprefix("file://")).read_text(encoding="utf-8"))
        for file in files:
            Path(file).write_bytes(b"picture")

    monkeypatch.setattr(pio, "write_images", write)
    out = export(path_map(), tmp_path / "m.svg")
    assert seen == [""]
    assert pio.defaults.mathjax is None
    assert (tmp_path / "m.svg") in out.files


def test_a_picture_that_the_browser_did_not_draw_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pio, "write_images", lambda *a, **k: None)
    out = export(path_map(), tmp_path / "m.pdf")
    assert out.message.startswith("no PDF: the browser did not draw it")
    assert {path.suffix for path in out.files} == ALWAYS


@pytest.mark.chromium
def test_pictures_are_drawn_at_the_figures_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(chromium()))
    fig = path_map(SIM)
    out = export(fig, tmp_path / "map", SIM)
    assert out.message == ""
    assert [path.suffix for path in out.files] == [".png", ".svg", ".pdf", ".html", ".csv", ".txt"]
    png = (tmp_path / "map.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (2 * fig.layout.width, 2 * fig.layout.height)
    assert (tmp_path / "map.pdf").read_bytes()[:5] == b"%PDF-"
    svg = (tmp_path / "map.svg").read_text(encoding="utf-8")
    for word in ("virtio-blk driver", "hardware", "U7", COST_TABLE):
        assert word in svg


@pytest.mark.chromium
def test_the_page_draws_without_asking_anything_and_has_no_upload_button(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    export(waterfall(SIM, LIVE), tmp_path / "w.html")
    asked: list[str] = []
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.goto((tmp_path / "w.html").as_uri())
            page.wait_for_selector(".js-plotly-plot .main-svg")
            page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot .bars .point').length >= 60")
            page.wait_for_load_state("networkidle")
            buttons = page.evaluate("() => [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title || b.ariaLabel || '')")
            wide = page.evaluate("() => document.querySelector('.js-plotly-plot .main-svg').getBoundingClientRect().width")
        finally:
            browser.close()
    assert asked == [(tmp_path / "w.html").as_uri()]
    assert wrong == []
    assert wide == waterfall(SIM).layout.width
    assert buttons
    assert not any("share" in title.lower() or "cloud" in title.lower() or "produced" in title.lower() for title in buttons)
