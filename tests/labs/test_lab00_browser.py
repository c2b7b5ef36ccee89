"""Lab 00 as a learner meets it: JupyterLab in a browser, every cell run, a slider moved."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from .jupyter_home import copy_labs

pytestmark = pytest.mark.chromium

NOTEBOOK = "00_the_whole_path.ipynb"
FIGURES = 3
PRESSES = 8


def test_first_lab_draws_and_its_slider_moves_the_picture(tmp_path: Path) -> None:
    from .browser import lab_server, open_notebook  # playwright is loaded only where there is a browser

    folder, home = copy_labs(tmp_path / "labs"), tmp_path / "jupyter"
    home.mkdir()
    with lab_server(folder, home) as server, open_notebook(server, NOTEBOOK) as lab:
        lab.run_all()
        assert lab.errors() == []
        lab.wait_for_figures(FIGURES)
        lab.picture("lab00-top")

        slider = lab.slider("iodepth")
        start = slider.figures()
        took = [slider.press("ArrowRight") for _ in range(PRESSES)]
        moved = slider.figures()
        lab.picture("lab00-slider")
        print(f"slider to redraw: median {statistics.median(took):.0f} ms, longest {max(took):.0f} ms of {PRESSES}")

        assert moved != start
        assert lab.errors() == []
        assert lab.interruptions() == []
        assert lab.off_this_machine() == []
        assert lab.news_requests() == []
        assert lab.console_errors == []
