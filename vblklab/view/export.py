"""A figure as files for a report: picture, a page that needs no network, the numbers as CSV and where they come from."""

from __future__ import annotations

import base64
import csv
import html
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.io as pio

from ..errors import ConfigError
from .runs import RunLike, as_runs, caption, check_runs, provenance_text
from .style import CONFIG, WIDTH

__all__ = ["Exported", "export"]

PICTURES = (".png", ".svg", ".pdf")
_HOW = "install Debian's chromium (or Google Chrome), then export again; or open the HTML file and print it"
_FIXED = ("trace", "point", "x", "x_unit", "y", "y_unit", "base", "text")


@dataclass(frozen=True, slots=True)
class Exported:
    """What ``export`` wrote; ``message`` is one line about pictures that could not be made, empty when all is there."""

    files: tuple[Path, ...]
    message: str = ""

    def __str__(self) -> str:
        return "\n".join([f"wrote {', '.join(f.name for f in self.files)}", *([self.message] if self.message else [])])

    def _repr_html_(self) -> str:
        return "<br>".join(html.escape(line) for line in str(self).splitlines())


def export(fig: Any, path: str | Path, run: RunLike | Sequence[RunLike] | None = None) -> Exported:
    """Write ``fig`` to ``path``: ``.png``, ``.svg``, ``.pdf`` or ``.html``, or all of them when there is no suffix.

    Always beside it: the self-contained ``.html``, the data as ``.csv`` (one row a point, named columns) and the provenance as
    ``.txt``.  ``run`` (or several) is asked for the provenance; a figure of this package carries its own already.  Pictures
    need a Chrome or Chromium; without one the other files are written and ``message`` says how to get them.
    """
    runs = as_runs(run)
    check_runs(runs, least=0)
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix and suffix not in (*PICTURES, ".html"):
        raise ConfigError(f"export to {target.name!r}", "use .png, .svg, .pdf or .html, or no suffix for all of them")
    if not target.name or target.is_dir():
        raise ConfigError(f"export to {str(path)!r}", "give a file name, for example 'waterfall.png'")
    if not target.parent.is_dir():
        raise ConfigError(f"export to {str(path)!r}: there is no folder {str(target.parent)!r}", "make it first")
    stem = target.with_suffix("") if suffix else target
    text = _provenance(fig, runs)
    files = {".html": _page(fig, text), ".csv": _table(fig), ".txt": text}
    try:
        for ending, content in files.items():
            stem.with_name(stem.name + ending).write_text(content, encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename!r}: {error.strerror}", "choose another folder") from None
    wanted = [stem.with_name(stem.name + s) for s in ([suffix] if suffix in PICTURES else () if suffix else PICTURES)]
    message = _pictures(fig, wanted) if wanted else ""
    written = [p for p in wanted if p.is_file() and not message] + [stem.with_name(stem.name + ending) for ending in files]
    return Exported(tuple(written), message)


def _pictures(fig: Any, paths: Sequence[Path]) -> str:
    """Let plotly's kaleido draw the files with one browser; gives one line when it cannot."""
    if not _browser_is_there():
        return f"no {_names(paths)}: there is no Chrome or Chromium here; {_HOW}"
    size, before = fig.layout, pio.defaults.mathjax
    with tempfile.TemporaryDirectory(prefix="vblklab-") as folder:
        empty = Path(folder, "empty.js")
        empty.write_text("", encoding="utf-8")
        drawn = [Path(folder, "figure" + path.suffix) for path in paths]
        pio.defaults.mathjax = empty.as_uri()  # else kaleido's page asks the network for MathJax
        try:
            pio.write_images([fig] * len(drawn), drawn, width=size.width or WIDTH, height=size.height or 500,
                             scale=[2 if path.suffix == ".png" else 1 for path in drawn])
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            return f"no {_names(paths)}: {_reason(error)}; {_HOW}"
        finally:
            pio.defaults.mathjax = before
        missing = [path for path, made in zip(paths, drawn, strict=True) if not (made.is_file() and made.stat().st_size)]
        if missing:
            return f"no {_names(missing)}: the browser did not draw it; {_HOW}"
        for path, made in zip(paths, drawn, strict=True):
            path.write_bytes(made.read_bytes())
    return ""


def _browser_is_there() -> bool:
    """Ask first: kaleido opens its pipes before it finds out that there is no browser, and leaves them open."""
    try:
        from choreographer.browsers.chromium import Chromium

        path = Chromium.find_browser(skip_local=False)
    except (ImportError, AttributeError, TypeError):
        return True  # another version of kaleido's helper: let kaleido find out
    return path is not None and Path(path).is_file()


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.suffix[1:].upper() for path in paths)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "chrome" in text.lower():
        return "there is no Chrome or Chromium here"
    return f"{type(error).__name__} ({text[:120]})" if text else type(error).__name__


def _provenance(fig: Any, runs: Sequence[RunLike]) -> str:
    meta = fig.layout.meta if isinstance(fig.layout.meta, dict) else {}
    title = meta.get("title") or (fig.layout.title.text or "figure")
    small = meta.get("caption") or (caption(runs) if runs else "")
    full = provenance_text(runs) if runs else meta.get("provenance", "")
    parts = [title, small, full or "No run was given with this figure: where its numbers come from is not recorded."]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _page(fig: Any, provenance: str) -> str:
    """One HTML file with plotly.js inside, and the provenance below the figure."""
    page: str = pio.to_html(fig, config=CONFIG, include_plotlyjs=True, include_mathjax=False, full_html=True)
    meta = fig.layout.meta if isinstance(fig.layout.meta, dict) else {}
    head = (f"<html lang=\"en\"><head><title>{html.escape(str(meta.get('title', 'figure')))}</title>"
            "<style>body{margin:16px;font-family:Arial,Helvetica,sans-serif;color:#1d2733;background:#fff}"
            "details{width:860px;margin:0 20px;font-size:13px}pre{white-space:pre-wrap}</style>")
    page = page.replace("<html>\n<head>", head, 1)
    below = f"<details><summary>Where these numbers come from</summary><pre>{html.escape(provenance)}</pre></details>\n"
    at = page.rindex("</body>")
    return page[:at] + below + page[at:]


def _table(fig: Any) -> str:
    """The figure's data as CSV text: a row for each point of each trace."""
    points = [point for trace in fig.data for point in _points(trace)]
    named = list(dict.fromkeys(key for point in points for key in point if key not in _FIXED))
    lines: list[str] = []

    class _Sink:
        def write(self, text: str) -> int:
            lines.append(text)
            return len(text)

    writer = csv.DictWriter(_Sink(), [*_FIXED, *named], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return "".join(lines)


def _points(trace: Any) -> Iterator[dict[str, Any]]:
    meta = trace.meta if isinstance(trace.meta, dict) else {}
    if meta.get("data") is False:
        return
    x, y = _values(trace.x), _values(trace.y)
    base, text, extra = (_values(trace[key]) if key in trace else [] for key in ("base", "text", "customdata"))
    columns = meta.get("columns") or []
    for i in range(max(len(x), len(y))):
        row: dict[str, Any] = {"trace": trace.name or "", "point": i, "x": _at(x, i), "x_unit": meta.get("x_unit", ""), "y": _at(y, i),
                               "y_unit": meta.get("y_unit", ""), "base": _at(base, i), "text": _at(text, i)}
        own = _at(extra, i)
        for k, value in enumerate(own if isinstance(own, (list, tuple)) else []):
            row[columns[k] if k < len(columns) else f"customdata_{k}"] = _plain(value)
        yield row


def _at(values: list[Any], i: int) -> Any:
    return _plain(values[i]) if i < len(values) else ""


def _plain(value: Any) -> Any:
    """A cell: no markup line breaks, no None."""
    return "" if value is None else value.replace("<br>", " ") if isinstance(value, str) else value


def _values(data: Any) -> list[Any]:
    """A trace's array as a list of Python numbers and strings; also plotly's packed form, which JSON files hold."""
    if data is None:
        return []
    if isinstance(data, dict) and "bdata" in data:
        array = np.frombuffer(base64.b64decode(data["bdata"]), dtype=np.dtype(data["dtype"]))
        shape = data.get("shape")
        data = array.reshape([int(n) for n in str(shape).split(",")]) if shape else array
    if isinstance(data, np.ndarray):
        return list(data.tolist())
    return list(data) if isinstance(data, (list, tuple)) else [data]
