"""The report page of one run."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import vblklab as vb
from vblklab.trace.run import Run
from vblklab.view.report import report


@pytest.fixture(scope="module")
def run() -> Run:
    result: Run = vb.Pipeline(app=vb.Fio(rw="randread", number_ios=50)).run(vb.SimMachine())
    return result


def tables(page: str) -> str:
    """The page without scripts and figures."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_a_report_says_where_every_number_comes_from(run: Run) -> None:
    page = tables(report(run))
    for value in [*run.provenance.values(), *run.recipe, *(f"{count:,}" for count in run.counters.values())]:
        assert value.replace("'", "&#x27;") in page
    assert page.count("<tr><td><b>") == 15


def test_an_interrupted_run_is_called_so(run: Run) -> None:
    assert "interrupted" not in tables(report(run))
    assert "interrupted: a part of the job" in tables(report(replace(run, interrupted=True)))


def test_what_went_wrong_is_in_sight(run: Run) -> None:
    assert 'class="bad"' not in tables(report(run))
    job = replace(run.jobs[0], mismatch_count=7, mismatches=["offset 512: <odd>"])
    page = tables(report(replace(run, jobs=[job])))
    assert '<td class="bad">0 I/O errors, 7 sectors differ' in page
    assert "<li>offset 512: &lt;odd&gt;</li>" in page


def test_names_are_escaped(run: Run) -> None:
    page = tables(report(replace(run, title="<b>run</b>", notes=["a & b"], recipe={"disk": "ImageFile(path='<i>.img')"})))
    assert "<h1>&lt;b&gt;run&lt;/b&gt;</h1>" in page
    assert "<li>a &amp; b</li>" in page
    assert "&lt;i&gt;.img" in page
    assert "<i>" not in page


def test_a_run_without_ios_has_reasons_in_place_of_figures(run: Run) -> None:
    nothing = vb.Pipeline(app=vb.Fio(rw="randread", number_ios=50)).boot(vb.SimMachine())
    page = report(nothing.result(interrupted=True))
    nothing.close()
    assert page.count('class="missing"') == 3
    assert "No latency: run" in page
    assert "0 IOPS" in page
