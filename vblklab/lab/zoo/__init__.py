"""The bug zoo: bugs of real devices and drivers, each a small subclass that a learner repairs.  ``vb.zoo()`` lists them."""

from __future__ import annotations

import difflib
import html
import inspect
from collections.abc import Iterator

from ...errors import ConfigError
from .judge import trouble_of
from .specimens import SPECIMENS, Specimen

__all__ = ["Exhibit", "Zoo", "zoo"]


class Exhibit:
    """One bug: ``story``, ``reference``, ``section``, the class ``cls`` and its ``source``; ``show()`` says what it breaks."""

    def __init__(self, specimen: Specimen) -> None:
        self.name, self.cls = specimen.name, specimen.cls
        self.story = " ".join(inspect.cleandoc(specimen.cls.__doc__ or "").split())
        self.reference, self.section = specimen.reference, specimen.section
        self._specimen = specimen

    @property
    def base(self) -> type:
        """The package's own class, which does it right."""
        return self.cls.__mro__[1]

    @property
    def source(self) -> str:
        """The class as text, without its story: a place to begin a repair."""
        return inspect.getsource(self.cls).replace(f'    """{self.cls.__doc__}"""\n\n', "")

    def show(self) -> str:
        """What goes wrong, as the check would say it."""
        return str(trouble_of(self._specimen, self.cls))

    def __repr__(self) -> str:
        return f"{self.name} (§{self.section})\n\n{self.story}\n\nSeen in: {self.reference}\n\n{self.source}"

    def _repr_html_(self) -> str:
        return (
            f"<h4>{self.name} <small>§{self.section}</small></h4><p style='max-width:850px'>{html.escape(self.story)}</p>"
            f"<p>Seen in: {html.escape(self.reference)}</p><pre>{html.escape(self.source)}</pre>"
        )


class Zoo:
    """All exhibits."""

    def __init__(self) -> None:
        self.exhibits = [Exhibit(one) for one in SPECIMENS]

    def __iter__(self) -> Iterator[Exhibit]:
        return iter(self.exhibits)

    def __len__(self) -> int:
        return len(self.exhibits)

    def __repr__(self) -> str:
        width = max(len(one.name) for one in self)
        return "\n".join(f"{one.name:{width}}  {one.base.__name__:16}  {one.story.split('. ')[0]}." for one in self)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{one.name}</code></td><td><code>{one.base.__name__}</code></td>"
            f'<td style="text-align:left">{html.escape(one.story.split(". ")[0])}.</td></tr>'
            for one in self
        )
        return f"<table><tr><th>bug</th><th>subclass of</th><th>what it does</th></tr>{rows}</table>"


def zoo(name: str | None = None) -> Zoo | Exhibit:
    """All bugs, or the one of this name; ConfigError names the nearest."""
    if name is None:
        return Zoo()
    for one in SPECIMENS:
        if one.name == name:
            return Exhibit(one)
    names = [one.name for one in SPECIMENS]
    near = difflib.get_close_matches(str(name), names, 1)
    hint = f"did you mean {near[0]!r}? There are " if near else "there are "
    raise ConfigError(f"no bug {name!r} in the zoo", hint + ", ".join(names))
