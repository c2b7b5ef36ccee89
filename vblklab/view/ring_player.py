"""A film of a virtqueue as a widget that plays, steps and scrubs; all frames go to the browser at once, so the kernel may be busy."""

from __future__ import annotations

from html import escape
from typing import Any

import anywidget
import traitlets

from ..errors import ConfigError
from ..trace.film import Film
from .ring_panel import key_row, panel, svg

__all__ = ["RingPlayer", "still"]

MOST_FRAMES, STILL_FRAMES = 400, 4

_ESM = """
function button(parent, label, text) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.title = label;
  parent.append(made);
  return made;
}

function render({ model, el }) {
  const frames = model.get("frames"), labels = model.get("labels"), last = frames.length - 1;
  const root = document.createElement("div"), bar = document.createElement("div"), picture = document.createElement("div");
  root.className = "vblklab-ring";
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", model.get("title"));
  const back = button(bar, "step back", "◀ back"), play = button(bar, "play", "▶ play"), next = button(bar, "step forward", "step ▶");
  const scrub = document.createElement("input");
  Object.assign(scrub, { type: "range", min: 0, max: last, step: 1 });
  scrub.setAttribute("aria-label", "frame");
  const speed = document.createElement("select");
  speed.setAttribute("aria-label", "frames a second");
  for (const rate of [1, 2, 4, 10]) speed.add(new Option(`${rate} a second`, rate, rate === 2, rate === 2));
  const where = document.createElement("span");
  where.setAttribute("role", "status");
  bar.append(scrub, speed, where);
  bar.className = "vblklab-ring-bar";
  picture.setAttribute("role", "img");
  root.append(bar, picture);
  el.append(root);

  let timer = null;
  const show = () => {
    const at = model.get("frame");
    picture.innerHTML = frames[at];
    picture.setAttribute("aria-label", labels[at]);
    scrub.value = at;
    scrub.setAttribute("aria-valuetext", labels[at]);
    where.textContent = `${model.get("first") + at} of ${model.get("count") - 1}`;
    back.disabled = at === 0;
    next.disabled = at === last;
  };
  const go = (at) => {
    model.set("frame", Math.max(0, Math.min(last, at)));
    model.save_changes();
  };
  const pause = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶ play";
    play.setAttribute("aria-label", "play");
  };
  const start = () => {
    if (model.get("frame") === last) go(0);
    timer = setInterval(() => {
      go(model.get("frame") + 1);
      if (model.get("frame") === last) pause();
    }, 1000 / speed.value);
    play.textContent = "⏸ pause";
    play.setAttribute("aria-label", "pause");
  };
  const by = (steps) => () => { pause(); go(model.get("frame") + steps); };
  back.onclick = by(-1);
  next.onclick = by(1);
  play.onclick = () => (timer === null ? start() : pause());
  scrub.oninput = () => { pause(); go(Number(scrub.value)); };
  speed.onchange = () => { if (timer !== null) { pause(); start(); } };
  const keys = { ArrowLeft: by(-1), ArrowRight: by(1), Home: () => { pause(); go(0); }, End: () => { pause(); go(last); } };
  root.addEventListener("keydown", (event) => {
    event.stopPropagation();  // the notebook has these keys too
    if (event.target === speed || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  model.on("change:frame", show);
  show();
  return () => { pause(); model.off("change:frame", show); };
}
export default { render };
"""
_CSS = """
.vblklab-ring { background: #fff; color: #1d2733; padding: 6px 4px; width: max-content; max-width: 100%; overflow-x: auto }
.vblklab-ring-bar { display: flex; align-items: center; gap: 8px; margin: 0 4px 8px; font: 13px Arial, Helvetica, sans-serif }
.vblklab-ring-bar button, .vblklab-ring-bar select { font: inherit; color: inherit; padding: 4px 10px; min-width: 78px;
  border: 1px solid #9aa4ae; border-radius: 4px; background: #f6f8f9; cursor: pointer }
.vblklab-ring-bar button:disabled { opacity: 0.45; cursor: default }
.vblklab-ring-bar :focus-visible { outline: 3px solid #0072b2; outline-offset: 1px }
.vblklab-ring-bar input { width: 280px }
.vblklab-ring-bar span { font-variant-numeric: tabular-nums; color: #57636f }
"""


class RingPlayer(anywidget.AnyWidget):
    """The widget.  ``frame`` is the frame that is shown, counted from the first one in the player; it can be set.

    The controls are buttons and a slider that take the focus; with it, ← → Home and End step.  Of a film of more than 400 frames
    it takes 400 from ``start`` on.
    """

    _esm = _ESM
    _css = _CSS
    frames = traitlets.List(traitlets.Unicode()).tag(sync=True)
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    first = traitlets.Int().tag(sync=True)
    count = traitlets.Int().tag(sync=True)
    frame = traitlets.Int().tag(sync=True)

    def __init__(self, film: Film, start: int = 0) -> None:
        first = film.check(start) if len(film) > MOST_FRAMES else 0
        shown = film[first : first + MOST_FRAMES]
        self._film = film
        super().__init__(
            frames=_pictures(film, [frame.number for frame in shown]),
            labels=[f"frame {frame.number}: {frame.label}, {frame.what() or 'no change'}" for frame in shown],
            title=film.title, first=first, count=len(film), frame=film.check(start) - first,
        )

    @traitlets.validate("frame")
    def _known_frame(self, proposal: Any) -> int:
        value = int(proposal["value"])
        if not 0 <= value < max(len(self.frames), 1):
            raise ConfigError(f"frame {value} of a player", f"it has the frames 0 to {len(self.frames) - 1}")
        return value

    def bundle(self) -> dict[str, Any]:
        """What a notebook shows: the widget, or the first frames as pictures where there are no widgets."""
        shown: Any = super()._repr_mimebundle_()
        data = dict(shown[0] if isinstance(shown, tuple) else shown or {})
        return {**data, "text/html": still(self._film), "text/plain": str(self._film)}

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return self.bundle()


def _pictures(film: Film, numbers: list[int]) -> list[str]:
    """The frames as SVG, all of one height."""
    drawn = [panel(film, number) for number in numbers]
    height = max(one.height for one in drawn)
    key = key_row(film)
    return [svg([(one, 0.0), (key, height)], height + key.height) for one in drawn]


def still(film: Film) -> str:
    """The first frames as pictures in HTML, for a page without widgets."""
    pictures = _pictures(film, list(range(min(STILL_FRAMES, len(film)))))
    more = len(film) - len(pictures)
    rest = f"<p>… and {more:,} more frames; run the cell to play them.</p>" if more else ""
    return f'<div><p><b>{escape(film.title)}</b></p>{"".join(f"<div>{picture}</div>" for picture in pictures)}{rest}</div>'
