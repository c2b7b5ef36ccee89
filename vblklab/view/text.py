"""Text that must fit: estimated widths, cutting, wrapping and escaping for plotly's small markup."""

from __future__ import annotations

__all__ = ["SMALL_PX", "TEXT_PX", "TITLE_PX", "balanced", "escape", "fit", "text_px", "wrap"]

TITLE_PX, TEXT_PX, SMALL_PX = 19, 14, 12
_NARROW, _WIDE = frozenset("iljI.,:;'|! ·"), frozenset("mwMWQOGD%@—→+=")
_LESS = frozenset("tfr()[]/-\"")


def text_px(text: str, size: float = TEXT_PX, bold: bool = False) -> float:
    """A careful estimate of the printed width of ``text``: of DejaVu Sans, the widest that a browser may take for sans-serif."""
    ems = sum(0.32 if c in _NARROW else 0.4 if c in _LESS else 0.88 if c in _WIDE else 0.69 if c.isupper() else 0.62 for c in text)
    return ems * size * (1.08 if bold else 1.0)


def fit(text: str, width_px: float, size: float = TEXT_PX) -> str:
    """``text`` cut with an ellipsis so that it stays within ``width_px``."""
    if text_px(text, size) <= width_px:
        return text
    while text and text_px(text + "…", size) > width_px:
        text = text[:-1]
    return text.rstrip(" ·,(") + "…"


def wrap(text: str, width_px: float, size: float = TEXT_PX) -> list[str]:
    """``text`` broken at spaces into lines of at most ``width_px``; a single longer word is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and text_px(longer, size) > width_px:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return [fit(line, width_px, size) for line in lines]


def balanced(text: str, width_px: float, size: float = TEXT_PX) -> list[str]:
    """Like ``wrap``, but the lines are about equally long."""
    lines = wrap(text, width_px, size)
    width = width_px
    while len(lines) > 1 and len(tighter := wrap(text, width * 0.94, size)) == len(lines) and "…" not in "".join(tighter):
        width, lines = width * 0.94, tighter
    return lines


def escape(text: str) -> str:
    """``text`` without the characters that plotly reads as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
