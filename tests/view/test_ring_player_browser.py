"""The player as a learner meets it: in JupyterLab, by mouse and by keyboard, and in an exported page without a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

pytestmark = pytest.mark.chromium

ROOT = Path(__file__).resolve().parents[2]
CELL = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import vblklab as vb
app = vb.Fio(rw="randread", bs=4096, iodepth=2, number_ios=10)
def filmed(queue):
    return vb.film(vb.Pipeline(app=app, queue=queue, device=vb.VirtioBlkDevice(indirect=False)).boot(vb.SimMachine()), steps=400)
"""
CELLS = (CELL, "split = filmed(vb.Split(8))\nplayer = split.player(2)\nplayer", "filmed(vb.Packed(8))", "print('at', player.frame)")


def notebook_in(folder: Path) -> None:
    folder.mkdir()
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), folder / "ring.ipynb")


def test_the_player_plays_steps_and_scrubs(tmp_path: Path) -> None:
    from tests.labs.browser import lab_server, open_notebook  # playwright is loaded only where there is a browser

    notebook_in(tmp_path / "labs")
    home = tmp_path / "jupyter"
    home.mkdir()
    with lab_server(tmp_path / "labs", home) as server, open_notebook(server, "ring.ipynb") as lab:
        lab.run_all()
        assert lab.errors() == []
        lab.page.wait_for_function("() => document.querySelectorAll('.vblklab-ring').length === 2")
        player = lab.page.locator(".vblklab-ring").first
        status, picture = player.get_by_role("status"), player.locator("> [role=img]")

        def control(name: str) -> Any:
            return player.get_by_role("button", name=name, exact=True)

        def frame(number: int) -> None:
            lab.page.wait_for_function("([e, n]) => e.textContent.startsWith(`${n} of`)", arg=[status.element_handle(), number])
            assert f"frame {number} of" in (picture.text_content() or "")

        frame(2)
        assert "frame 2: virtqueue_kick_prepare" in (picture.get_attribute("aria-label") or "")
        lab.picture("ring-split")
        control("step forward").click()
        frame(3)
        control("step back").click()
        frame(2)
        control("step back").focus()
        lab.page.keyboard.press("Enter")
        frame(1)
        lab.page.keyboard.press("ArrowRight")
        frame(2)
        lab.page.keyboard.press("Home")
        frame(0)
        assert control("step back").is_disabled()
        order = [lab.page.evaluate("() => document.activeElement.getAttribute('aria-label')")]
        player.get_by_role("button", name="play").focus()
        for _ in range(3):
            order.append(lab.page.evaluate("() => document.activeElement.getAttribute('aria-label')"))
            lab.page.keyboard.press("Tab")
        assert order[1:] == ["play", "step forward", "frame"]
        scrub = player.get_by_role("slider", name="frame")
        scrub.focus()
        lab.page.keyboard.press("End")
        assert scrub.get_attribute("aria-valuetext")
        last = int(scrub.get_attribute("max") or 0)
        frame(last)
        scrub.fill("4")
        frame(4)
        control("play").click()  # two frames a second
        lab.page.wait_for_function("e => parseInt(e.textContent) >= 6", arg=status.element_handle())
        control("pause").click()
        stopped = int(status.inner_text().split()[0])
        assert control("play").is_visible()
        lab.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert int(status.inner_text().split()[0]) == stopped
        player.get_by_label("frames a second").select_option("10")
        scrub.fill(str(last - 5))
        control("play").click()
        frame(last)
        control("play").wait_for()  # it stops at the end by itself
        player.get_by_role("slider", name="frame").fill("6")
        frame(6)
        lab.page.locator(".vblklab-ring").nth(1).scroll_into_view_if_needed()
        lab.picture("ring-packed")
        assert player.bounding_box() is not None and (player.bounding_box() or {})["width"] <= 880
        assert lab.errors() == []
        assert lab.off_this_machine() == []
        assert lab.console_errors == []


def test_an_exported_page_shows_the_frames_as_pictures(tmp_path: Path) -> None:
    import asyncio

    from nbconvert import HTMLExporter

    from tests.labs.jupyter_home import jupyter_env
    from tests.labs.test_labs import run

    notebook_in(tmp_path / "labs")
    notebook = nbformat.read(tmp_path / "labs" / "ring.ipynb", as_version=4)
    (tmp_path / "jupyter").mkdir()
    asyncio.run(run(notebook, tmp_path / "labs", jupyter_env(tmp_path / "jupyter")))
    page, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook)
    assert page.count('role="img"') == 0
    assert page.count("virtqueue_kick_prepare (D3)") >= 2 and page.count('font-family="Open Sans') >= 8
