"""Cost tables as files: what comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import vblklab as vb
from tests.cost_tables import known_table
from vblklab.machine.costs import Cost

HEAD = "key,value,terms,share,ghz,kind,why,p25,p75,n\n"


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    odd = Cost(0.1 + 0.2, 'quotes " and, commas;\nand a line', "measured", 1e-9, 123456789.123456789, 17)
    table = vb.CostTable("odd", dict(known_table("kvm")) | {"odd:row": odd}, {"cpu": 'a, "b"', "remarks": "µs é"})
    back = vb.CostTable.load(table.save(tmp_path / "odd.csv"))
    assert dict(back) == dict(table) and list(back) == list(table)
    assert (back.name, back.about) == ("odd", table.about)
    assert dict(vb.CostTable.load(back.save(tmp_path / "again.csv"))) == dict(table)


def test_the_published_table_comes_back_too(tmp_path: Path) -> None:
    table = vb.CostTable.load()
    back = vb.CostTable.load(table.save(tmp_path / "published.csv"))
    assert dict(back) == dict(table) and not back.measured and not back.about


def test_a_file_simulates_as_its_table(tmp_path: Path) -> None:
    table = known_table("live")
    back = vb.CostTable.load(table.save(tmp_path / "mine.csv"))
    p = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, number_ios=10), disk=vb.Ram())
    runs = [p.run(vb.SimMachine(costs=one, like=vb.LiveMachine())) for one in (table, back)]
    assert (runs[0].rows == runs[1].rows).all()
    assert "mine, today" in runs[1].provenance["cost table"]


def test_the_rows_of_a_machine_stand_in_their_places() -> None:
    table = known_table("kvm")
    mine = table.on("kvm")
    assert mine is not None and mine["kvm_exit"] == table["kvm/kvm_exit"] and mine["room:device"] == table["room:device"]
    assert not any("/" in key for key in mine)
    assert table.on("live") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        (HEAD, "has no rows"),
        ("name,ns\nkvm_exit,3\n", "line 2: there is no column 'key'"),
        ("key,value\nkvm_exit,3\n", "line 2: there is no column 'why'"),
        (HEAD + "kvm_exit,fast,,,,measured,why,,,\n", "line 2: could not convert"),
        (HEAD + "kvm_exit,nan,,,,measured,why,,,\n", "line 2: a cost of nan"),
        (HEAD + "kvm_exit,-1,,,,measured,why,,,\n", "line 2: a cost of -1"),
        (HEAD + "kvm_exit,inf,,,,measured,why,,,\n", "line 2: a cost of inf"),
        (HEAD + "kvm_exit,1,,,,measured,why,,,many\n", "line 2: invalid literal"),
        (HEAD + 'kvm_exit,1,,,,measured,"two\nlines",,,\nkvm_entry,x,,,,measured,why,,,\n', "line 4: could not convert"),
        (HEAD + "kvm_exit,1,,,,measured,why,,,\n", "lacks"),
        ("\0\0\0", "no CSV file|no column|no rows"),
    ],
)
def test_a_file_that_is_no_cost_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(vb.ConfigError, match=message):
        vb.CostTable.load(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(vb.ConfigError, match="is no CSV file"):
        vb.CostTable.load(path)


def test_a_table_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(vb.ConfigError, match="cannot be written: No such file"):
        vb.CostTable.load().save(tmp_path / "none" / "mine.csv")


def test_text_and_html_tell_what_was_measured_and_what_was_not() -> None:
    table = vb.CostTable(
        "mine", dict(known_table("kvm")) | {"syscall": Cost(125.0, "a <loop>", "measured", 120.0, 130.0, 99)}, {"cpu": "<none>"}
    )
    text, page = str(table), table._repr_html_()
    assert "0.12 µs" in text and "99" in text and "in the shape of kvm" in text
    published = sum(cost.kind == "published" for cost in table.values())
    assert f"Not measured here: {published} published" in text and "1 measured elsewhere (ram:bytes_per_us)" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "a &lt;loop&gt;" in page and "&lt;none&gt;" in page and "<none>" not in page
    assert repr(table) == "CostTable('mine')"
