"""JupyterLab in a real browser: a server of its own, one notebook, and everything the page asked for.

::

    with lab_server(folder, home) as server, open_notebook(server, "lab.ipynb") as lab:
        lab.run_all()
        assert not lab.errors()
        lab.slider("iodepth").press("ArrowRight")
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Request, sync_playwright

from tests.peers import chromium

from .jupyter_home import jupyter_env

__all__ = ["Lab", "Server", "Slider", "lab_server", "open_notebook"]

START_S = 60.0
STEP_MS = 60_000.0
# The browser resolves no name and talks to nobody on its own account; what the page asks for is recorded as well.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
HERE = re.compile(r"((https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:)")
NEWS = re.compile(r"/lab/api/(news|update)")

_LAB_READY = "() => window.jupyterapp?.commands.hasCommand('notebook:run-all-cells')"
_KERNEL_IDLE = """() => { const context = window.jupyterapp.shell.currentWidget?.sessionContext;
    return context?.isReady && context.session?.kernel?.status === 'idle'; }"""
# Outputs as the notebook's model holds them: also of cells that are scrolled out of sight and not drawn.
_OUTPUTS = """() => window.jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code')
    .map(cell => ({id: cell.model.id, tags: cell.model.getMetadata('tags') ?? [], count: cell.model.executionCount,
                   source: cell.model.sharedModel.getSource(), outputs: cell.model.outputs.toJSON()}))"""
# The figures in the slider's own output, as data; a typed array is written as an array.
_FIGURES = """handle => JSON.stringify([...handle.closest('.jp-OutputArea').querySelectorAll('.js-plotly-plot')].map(plot => plot.data),
    (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value)"""
_WATCH = """handle => {
    window.__vblk = {pressed: 0, drawn: []};
    handle.addEventListener('keydown', () => { window.__vblk.pressed = performance.now(); window.__vblk.drawn = []; }, true);
    for (const plot of handle.closest('.jp-OutputArea').querySelectorAll('.js-plotly-plot'))
        plot.on('plotly_afterplot', () => window.__vblk.drawn.push(performance.now()));
}"""
_CHANGED_AND_DRAWN = f"([handle, before]) => window.__vblk.drawn.length > 0 && ({_FIGURES})(handle) !== before"


@dataclass(frozen=True)
class Server:
    """A running JupyterLab."""

    url: str
    token: str
    process: subprocess.Popen[bytes]


@contextmanager
def lab_server(folder: Path, home: Path) -> Iterator[Server]:
    """JupyterLab on 127.0.0.1 that shows ``folder`` and keeps everything else in ``home``; ended by its own process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"),
        "--LabApp.expose_app_in_browser=True",  # window.jupyterapp, by which the page is driven
    ]
    if os.geteuid() == 0:
        command.append("--allow-root")
    log = home / "server.log"
    env = jupyter_env(home)
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=env, cwd=home, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as lab,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_up(f"{url}/api/status?token={token}", lab, log)
            yield Server(url, token, lab)
        finally:
            lab.terminate()  # JupyterLab ends its kernels itself
            try:
                lab.wait(30)
            except subprocess.TimeoutExpired:
                lab.kill()


def _wait_until_up(url: str, lab: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if lab.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"JupyterLab does not come up: {log.read_text(errors='replace')[-2000:]}") from error
            time.sleep(0.05)


@dataclass
class Lab:
    """One notebook in the browser, and what the browser did."""

    page: Page
    requests: list[str] = field(default_factory=list)
    console_errors: list[str] = field(default_factory=list)

    def run_all(self) -> None:
        """Run every cell, wait until the last one is done and the kernel is idle again."""
        self.page.wait_for_function(_KERNEL_IDLE)  # a cell that is run earlier opens a dialog
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(_KERNEL_IDLE)

    def cells(self) -> list[dict[str, Any]]:
        """The code cells: id, tags, count, source, outputs."""
        found: list[dict[str, Any]] = self.page.evaluate(_OUTPUTS)
        return found

    def errors(self) -> list[str]:
        """Cells that did not run, raised, or wrote a traceback."""
        wrong = []
        for cell in self.cells():
            if cell["source"].strip() and cell["count"] is None:
                wrong.append(f"cell {cell['id']} did not run")
            for output in cell["outputs"]:
                raised = output["output_type"] == "error" and "raises-exception" not in cell["tags"]
                if raised or "Traceback (most recent call last)" in json.dumps(output.get("text", "")):
                    wrong.append(f"cell {cell['id']}: {json.dumps(output)[:500]}")
        return wrong

    def interruptions(self) -> list[str]:
        """The texts of dialogs and notifications on the page."""
        return self.page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts()

    def off_this_machine(self) -> list[str]:
        """Requests that meant to leave this machine."""
        return sorted({url for url in self.requests if not HERE.match(url)})

    def news_requests(self) -> list[str]:
        """Requests that make the server ask for news or updates."""
        return sorted({url for url in self.requests if NEWS.search(url)})

    def wait_for_figures(self, count: int) -> None:
        """Until ``count`` plotly figures are drawn; JupyterLab may draw a cell only when it is brought into sight."""
        for cell in self.page.locator(".jp-Notebook .jp-CodeCell").all():
            cell.scroll_into_view_if_needed()
        self.page.wait_for_function(
            "count => document.querySelectorAll('.js-plotly-plot .main-svg:first-child').length >= count", arg=count
        )
        self.page.locator(".jp-Notebook .jp-Cell").first.scroll_into_view_if_needed()

    def slider(self, name: str) -> Slider:
        """The first ipywidgets slider with this description."""
        row = self.page.locator(".widget-inline-hbox, .widget-inline-vbox").filter(has=self.page.get_by_text(name, exact=True))
        handle = row.locator(".noUi-handle").or_(self.page.locator(f".noUi-handle[aria-label={json.dumps(name)}]")).first
        handle.wait_for()
        handle.scroll_into_view_if_needed()
        handle.evaluate(_WATCH)
        return Slider(self.page, handle)

    def picture(self, name: str) -> None:
        """A screenshot of the page in the folder ``$VBLKLAB_SHOTS``, if that is set."""
        if folder := os.environ.get("VBLKLAB_SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@dataclass(frozen=True)
class Slider:
    """A slider and the figures in the same output."""

    page: Page
    handle: Any

    def figures(self) -> str:
        """The data of the figures, as JSON."""
        data: str = self.handle.evaluate(_FIGURES)
        return data

    def press(self, key: str) -> float:
        """Press a key on the slider, wait until the figures' data changed and was drawn; how long that took in ms."""
        before = self.figures()
        self.handle.press(key)
        self.page.wait_for_function(_CHANGED_AND_DRAWN, arg=[self.handle.element_handle(), before])
        took: float = self.page.evaluate("() => window.__vblk.drawn.at(-1) - window.__vblk.pressed")
        return took


@contextmanager
def open_notebook(server: Server, name: str, width: int = 1300, height: int = 1500) -> Iterator[Lab]:
    """The notebook ``name`` of the server's folder in a fresh headless browser, its kernel ready."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        try:
            context = browser.new_context(viewport={"width": width, "height": height}, service_workers="block")
            context.set_default_timeout(STEP_MS)
            page = context.new_page()
            lab = Lab(page)

            def seen(request: Request) -> None:
                lab.requests.append(request.url)

            context.on("request", seen)
            page.on("websocket", lambda websocket: lab.requests.append(websocket.url))
            page.on("console", lambda message: lab.console_errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: lab.console_errors.append(str(error)))
            context.route(lambda url: not HERE.match(url), lambda route: route.abort())
            page.goto(f"{server.url}/lab/tree/{name}?token={server.token}&reset")
            page.wait_for_function(_LAB_READY)
            page.wait_for_selector(".jp-Notebook .jp-Cell")
            page.wait_for_function(_KERNEL_IDLE)
            yield lab
        finally:
            browser.close()
