"""Cost tables: nanoseconds per trace point, each with the place it was taken from.  See data/costs/README.md."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .._data import DATA
from ..errors import ConfigError
from ..events import EVENTS
from .cost_text import table_html, table_text

__all__ = ["Cost", "CostTable"]

_TOP = 'style="text-align:left;vertical-align:top"'
_UNIT_NS = {"ns": 1.0, "us": 1e3, "ms": 1e6}
COLUMNS = ("key", "value", "terms", "share", "ghz", "kind", "why", "p25", "p75", "n")
_ABOUT = "about:"
_MOST = 1e15


@dataclass(frozen=True, slots=True)
class Cost:
    """``ns`` (or a plain number for ``drive:`` entries), where it comes from, and of which kind that is.

    A measured one has the quartiles of its ``n`` samples, else ``n`` is 0.
    """

    ns: float
    source: str
    kind: str
    p25: float = 0.0
    p75: float = 0.0
    n: int = 0

    def _repr_html_(self) -> str:
        rows = [("ns", f"{self.ns:,.6g}"), ("kind", self.kind), ("source", self.source)]
        if self.n:
            rows.insert(1, ("p25 to p75", f"{self.p25:,.6g} to {self.p75:,.6g}, {self.n:,} samples"))
        cells = (f"<tr><td {_TOP}><b>{name}</b></td><td {_TOP}>{html.escape(text)}</td></tr>" for name, text in rows)
        return f'<table style="max-width:850px">{"".join(cells)}</table>'


@cache
def _published() -> dict[int, dict[str, str]]:
    """Rows of the published figures by line number."""
    path = DATA / "published" / "calibration.csv"
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows: dict[int, dict[str, str]] = {}
        for row in reader:
            rows[len(rows) + 2] = row
        return rows


def _published_ns(line: int, ghz: float | None) -> float:
    row = _published()[line]
    value, unit = float(row["value"]), row["unit"].split()[0]
    if unit == "cycles":
        if ghz is None:
            raise ConfigError(f"published row {line} counts cycles", "the cost table must say ghz")
        return value / ghz
    return value * _UNIT_NS[unit]


class CostTable(Mapping[str, Cost]):
    """Costs by key.  ``CostTable.load()`` is the published table; ``replace(kvm_exit=500)`` states some yourself.

    ``vb.calibrate()`` makes a measured one: ``about`` says where and when, and what belongs to one live machine has a key
    ``MACHINE/key``, which ``on("MACHINE")`` puts in its place.
    """

    def __init__(self, name: str, costs: Mapping[str, Cost], about: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.about = dict(about or {})
        self._costs = dict(costs)

    @classmethod
    def load(cls, path: str | Path | None = None) -> CostTable:
        """A table from a CSV file, by default the published one; raises ConfigError naming the row that is wrong."""
        path = DATA / "costs" / "published.csv" if path is None else Path(path)
        costs: dict[str, Cost] = {}
        about: dict[str, str] = {}
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    try:
                        key = row["key"]
                        if key.startswith(_ABOUT):
                            about[key.removeprefix(_ABOUT)] = row["why"]
                        else:
                            costs[key] = _entry(row)
                    except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
                        what = f"there is no column {error}" if isinstance(error, KeyError) and error.args[0] in COLUMNS else str(error)
                        raise ConfigError(f"cost table {path.name}, line {reader.line_num}: {what}", "see data/costs/README.md") from None
        except OSError as error:
            raise ConfigError(f"cost table {path}: {error.strerror}", "give the path of a CSV file") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"cost table {path.name} is no CSV file: {error}", "vb.calibrate().save(path) writes one") from None
        if not costs:
            raise ConfigError(f"cost table {path.name} has no rows", "vb.calibrate().save(path) writes one")
        missing = sorted(set(_published_keys()) - set(costs))
        if missing:
            raise ConfigError(f"cost table {path.name} lacks {', '.join(missing[:4])}", "start from CostTable.load() and save() that")
        return cls(path.stem, costs, about)

    def save(self, path: str | Path) -> Path:
        """Write the table as CSV, every cost as its value with its source; ``load(path)`` gives the same table again.

        Raises ConfigError where it cannot be written.
        """
        path = Path(path)
        try:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                for name, text in self.about.items():
                    writer.writerow([_ABOUT + name, "", "", "", "", "about", text, "", "", ""])
                for key, cost in self._costs.items():
                    spread = [repr(cost.p25), repr(cost.p75), cost.n] if cost.n else ["", "", ""]
                    writer.writerow([key, repr(cost.ns), "", "1.0", "", cost.kind, cost.source, *spread])
        except OSError as error:
            raise ConfigError(f"cost table {path} cannot be written: {error.strerror}", "choose another folder") from None
        return path

    def on(self, machine: str) -> CostTable | None:
        """The table with the rows ``machine/key`` in the place of ``key``; None if there is none."""
        prefix = f"{machine}/"
        mine = {key.removeprefix(prefix): cost for key, cost in self._costs.items() if key.startswith(prefix)}
        if not mine:
            return None
        return CostTable(self.name, {key: cost for key, cost in self._costs.items() if "/" not in key} | mine, self.about)

    @property
    def measured(self) -> dict[str, Cost]:
        """The rows that were measured with this table, not published or modelled."""
        return {key: cost for key, cost in self._costs.items() if cost.n}

    @property
    def origin(self) -> str:
        """One line for a figure: the table's name, and where it comes from."""
        if not self.about:
            return f"{self.name} (data/costs, sources in data/published)"
        return f"{self.name}, {self.about.get('date', 'undated')}; what was not measured is published (data/costs)"

    def replace(self, **ns: float) -> CostTable:
        """Another table with these costs stated by you; ``:`` in a key is written ``__`` (``wake__device=0``)."""
        costs = dict(self._costs)
        for name, value in ns.items():
            key = name.replace("__", ":")
            if key not in costs and key not in EVENTS:
                raise ConfigError(f"no trace point or cost {key!r}", f"the table has {', '.join(sorted(costs)[:8])} …")
            if value < 0:
                raise ConfigError(f"cost of {key}: {value}", "a cost is 0 or more ns")
            costs[key] = Cost(value, "stated by you", "stated by you")
        return CostTable(f"{self.name}, changed by you" if ns else self.name, costs, self.about)

    def of_event(self, key: str) -> Cost:
        """The cost of a trace point: its own, the learner's, or its room's default, marked so."""
        if key in self._costs:
            return self._costs[key]
        event = EVENTS[key]
        if event.cost_ns is not None:
            return Cost(event.cost_ns, "stated by you", "stated by you")
        default = self._costs[f"room:{event.room}"]
        return Cost(default.ns, f"default of the room {event.room}: {default.source}", "room default")

    def number(self, key: str) -> float:
        """A plain entry; raises ConfigError if the table lacks it."""
        if key not in self._costs:
            raise ConfigError(f"the cost table {self.name!r} has no {key!r}", "add the row")
        return self._costs[key].ns

    def __getitem__(self, key: str) -> Cost:
        return self._costs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._costs)

    def __len__(self) -> int:
        return len(self._costs)

    def __repr__(self) -> str:
        return f"CostTable({self.name!r})"

    def __str__(self) -> str:
        return "\n".join(table_text(self))

    def _repr_html_(self) -> str:
        return table_html(self)


@cache
def _published_keys() -> tuple[str, ...]:
    with (DATA / "costs" / "published.csv").open(encoding="utf-8", newline="") as file:
        return tuple(row["key"] for row in csv.DictReader(file))


def _entry(row: Mapping[str, str]) -> Cost:
    if row["value"]:
        value = float(row["value"])
        if not 0 <= value < _MOST:
            raise ValueError(f"a cost of {row['value']}")
        spread = (float(row.get("p25") or 0), float(row.get("p75") or 0), int(row.get("n") or 0))
        return Cost(value, row["why"], row["kind"], *spread)
    ghz = float(row["ghz"]) if row["ghz"] else None
    terms = re.findall(r"([+-])(\d+)", row["terms"])
    if not terms:
        raise ValueError("neither value nor terms")
    total = sum((1 if sign == "+" else -1) * _published_ns(int(line), ghz) for sign, line in terms)
    share = float(row["share"])
    places: list[str] = []
    for sign, line in terms:
        source = _published()[int(line)]
        places.append(
            f"{sign if places or sign == '-' else ''}{source['value']} {source['unit']} "
            f"({source['set_id']}: {source['metric']}; {source['source']})"
        )
    clock = f" at {ghz} GHz" if ghz else ""
    scale = "" if share == 1 else f"{share:g} × "
    return Cost(max(total * share, 0.0), f"{scale}[{' '.join(places)}]{clock}: {row['why']}", row["kind"])
