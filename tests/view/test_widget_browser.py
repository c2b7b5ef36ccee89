"""Live figures as a learner meets them: JupyterLab in a browser, a slider pressed, the picture drawn anew."""

from __future__ import annotations

import statistics
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.chromium

ROOT = Path(__file__).resolve().parents[2]
CELLS = (
    f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from tests.view.fake_run import live_run, sim_run
from vblklab.errors import ConfigError
from vblklab.view import explore, path_map, waterfall
live, runs = live_run(), [sim_run(f"iodepth {{d}}", seed=d, scale={{"D4": d + 1}}) for d in range(8)]
def pick(iodepth):
    if iodepth == 6:
        raise ConfigError("iodepth=6 <b>", "this fake has no such run")
    return runs[iodepth]
explore(pick, iodepth=(1, 7))""",
    "explore(lambda other: (runs[other], live), view=path_map, other=[1, 2, 3, 4, 5, 6])",
)
_UPLOADS = """() => [...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title || '')
    .filter(title => /share|cloud|chart studio/i.test(title))"""


def test_sliders_redraw_their_figures_and_plotly_is_loaded_once(tmp_path: Path) -> None:
    from tests.labs.browser import lab_server, open_notebook  # playwright is loaded only where there is a browser

    folder, home = tmp_path / "labs", tmp_path / "jupyter"
    folder.mkdir()
    home.mkdir()
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), folder / "view.ipynb")
    with lab_server(folder, home) as server, open_notebook(server, "view.ipynb") as lab:
        lab.run_all()
        assert lab.errors() == []
        lab.wait_for_figures(2)
        took = {}
        for name in ("iodepth", "other"):
            slider = lab.slider(name)
            start = slider.figures()
            took[name] = [slider.press("ArrowRight") for _ in range(4)]
            assert slider.figures() != start
            lab.picture(f"explore-{name}")
        slider = lab.slider("iodepth")
        before = slider.figures()
        slider.handle.press("ArrowRight")
        lab.page.wait_for_selector(".vblklab-error")
        assert lab.page.locator(".vblklab-error").all_inner_texts() == ["ConfigError: iodepth=6 <b>: this fake has no such run"]
        assert slider.figures() == before, "the picture stays when the recipe cannot be"
        slider.press("ArrowRight")
        assert lab.page.locator(".vblklab-error").count() == 0
        slots = lab.page.evaluate("() => Object.keys(globalThis).filter(key => key.startsWith('__vblklab_plotly_'))")
        assert len(slots) == 1
        assert lab.page.evaluate(_UPLOADS) == []
        assert lab.errors() == []
        assert lab.off_this_machine() == []
        assert lab.console_errors == []
        print("slider to redraw, median ms:", {name: round(statistics.median(ms)) for name, ms in took.items()})
