"""Swim lanes from a trace."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

import vblklab as vb
from vblklab.errors import ConfigError
from vblklab.events import EVENTS
from vblklab.trace.run import TraceEvent
from vblklab.view import lanes
from vblklab.view.style import ROOM_COLOURS

from .fake_run import live_run, make_trace, sim_run

SIM = sim_run()


def _bars(fig: Any) -> list[tuple[Any, int]]:
    return [(trace, i) for trace in fig.data if trace.type == "bar" and trace.base is not None for i in range(len(trace.x))]


def _lanes(fig: Any) -> list[str]:
    return [note.name for note in fig.layout.annotations if note.name != "caption"]


def _run(*events: tuple[int, str, str, str]) -> Any:
    return dataclasses.replace(SIM, trace=[TraceEvent(t, context, lane, key, ()) for t, context, lane, key in events])


def test_lanes_stand_in_the_order_of_the_path() -> None:
    assert _lanes(lanes(SIM)) == ["vCPU 0", "KVM", "iothread", "host", "disk"]


def test_a_bar_lasts_until_the_same_contexts_next_event_and_waiting_is_not_drawn() -> None:
    run = _run((100, "a", "vCPU 0", "virtio_queue_rq"), (130, "b", "iothread", "virtqueue_pop"), (150, "a", "vCPU 0", "wait"),
               (170, "b", "iothread", "wait"), (400, "a", "vCPU 0", "vm_notify"), (450, "a", "vCPU 0", "wait"))
    found = {trace.customdata[i][0]: (trace.base[i], trace.x[i]) for trace, i in _bars(lanes(run, 0, 1000, unit="ns"))}
    assert found == {"virtio_queue_rq": (0, 50), "virtqueue_pop": (30, 40), "vm_notify": (300, 50)}


def test_bars_have_the_colour_of_their_room() -> None:
    for trace, i in _bars(lanes(SIM)):
        assert trace.marker.color[i] == ROOM_COLOURS[EVENTS[trace.customdata[i][0]].room]


def test_hover_says_key_name_meaning_and_arguments() -> None:
    trace, i = next((t, i) for t, i in _bars(lanes(SIM)) if t.customdata[i][0] == "host:block_getrq")
    key, lane, context, args, meaning, _ = trace.customdata[i]
    assert (key, lane, context) == ("host:block_getrq", "host", "iothread0")
    assert args.startswith("io=")
    assert "D6, block_getrq: kernel tracepoint" in meaning
    assert EVENTS[key].meaning in meaning
    assert "%{customdata[3]}" in trace.hovertemplate


def test_bars_in_one_row_never_overlap() -> None:
    fig = lanes(sim_run(trace=make_trace(32, iodepth=8)))
    rows: dict[float, list[tuple[float, float]]] = {}
    for trace, i in _bars(fig):
        rows.setdefault(trace.y[i], []).append((trace.base[i], trace.base[i] + trace.x[i]))
    for spans in rows.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    assert len(rows) > len(_lanes(fig)), "eight commands in the drive need rows of their own"


def test_the_default_window_holds_the_first_three_ios() -> None:
    fig = lanes(SIM)
    done = [trace.customdata[i] for trace, i in _bars(fig) if trace.customdata[i][0] == "block_bio_complete"]
    assert len(done) == 3


def test_a_window_cuts_the_bars_at_its_edges() -> None:
    for trace, i in _bars(lanes(SIM, 5_000, 20_000, unit="ns")):
        assert trace.base[i] >= 5_000
        assert trace.base[i] + trace.x[i] <= 20_000


def test_live_time_starts_at_the_first_event_and_python_is_hatched() -> None:
    fig = lanes(live_run())
    assert min(trace.base[i] for trace, i in _bars(fig)) == 0
    hatched = [(trace, i) for trace, i in _bars(fig) if isinstance(trace.marker.pattern.shape, tuple)]
    shapes = {trace.customdata[i][0]: trace.marker.pattern.shape[i] for trace, i in hatched}
    assert shapes["virtqueue_pop"] == "/"
    assert "Hatched" in fig.layout.meta["caption"]
    assert "Hatched" not in lanes(SIM).layout.meta["caption"]


def test_more_than_3000_bars_are_cut_and_the_caption_says_so() -> None:
    run = sim_run(trace=make_trace(200, iodepth=16))
    fig = lanes(run, 0, 10**12)
    assert len(_bars(fig)) == 3000
    ends = [trace.base[i] + trace.x[i] for trace, i in _bars(fig)]
    assert max(ends) == pytest.approx(max(trace.base[i] for trace, i in _bars(fig)), abs=0.002), "cut where the last bar begins"
    assert "the first 3,000 of 6,800 bars" in fig.layout.meta["caption"]
    assert "Cut" not in lanes(SIM).layout.meta["caption"]


def test_a_learners_undeclared_event_is_drawn_as_other() -> None:
    fig = lanes(_run((0, "a", "vCPU 0", "no_such_event"), (50, "a", "vCPU 0", "wait")))
    assert [trace.customdata[i][0] for trace, i in _bars(fig)] == ["no_such_event"]


@pytest.mark.parametrize(("trace", "window", "said"), [
    (None, (None, None), "kept no trace"), ([], (None, None), "kept no trace"), (SIM.trace, (500, 500), "must be after"),
    (SIM.trace, (10**12, 10**12 + 1), "no event from"),
])
def test_nothing_to_draw_is_a_config_error(trace: Any, window: tuple[Any, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lanes(dataclasses.replace(SIM, trace=trace), *window)


def test_eight_kinds_beside_the_names_of_the_lanes_take_two_rows() -> None:
    fig = lanes(SIM)
    kinds = [trace for trace in fig.data if trace.legend == "legend2"]
    assert len(kinds) == 8
    assert (1 - fig.layout.legend2.y) * fig.layout.height + 2 * 20 <= fig.layout.margin.t, "the legend runs into the first lane"


READS = vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=20)
ALWAYS = {"vCPU 0", "KVM", "host", "disk"}


@pytest.mark.parametrize(("wiring", "threads"), [
    (dict(kick="ioeventfd", call="irqfd"), {"iothread"}),
    (dict(kick="ioeventfd", call="intx"), {"iothread", "main loop"}),
    (dict(kick="ioeventfd", call="intx", iothread=False), {"main loop"}),
    (dict(kick="mmio-exit", call="irqfd"), {"main loop"}),
    (dict(kick="mmio-exit", call="intx"), {"main loop"}),
])
def test_each_thread_that_works_has_a_lane(wiring: dict[str, Any], threads: set[str]) -> None:
    fig = vb.Pipeline(app=READS, kvm=vb.Kvm(**wiring)).run(vb.SimMachine()).lanes()
    assert set(_lanes(fig)) == ALWAYS | threads


@pytest.mark.parametrize(("call", "key"), [("intx", "kvm_set_irq"), ("msi", "kvm_msi_set_irq")])
def test_the_main_loop_that_raises_the_interrupt_is_drawn_doing_it(call: str, key: str) -> None:
    vm = vb.Pipeline(app=READS, transport=vb.Pci(), kvm=vb.Kvm(call=call)).boot(vb.SimMachine())
    event = vm.step_until(key)
    assert event is not None and (event.context, event.lane) == ("main loop", "main loop")
    run = vm.run()
    assert {e.lane for e in run.trace if e.context == "main loop"} == {"main loop"}
    drawn = [trace.customdata[i] for trace, i in _bars(run.lanes()) if trace.customdata[i][1] == "main loop"]
    assert {each[0] for each in drawn} == {key} and len(drawn) == 3, "an interrupt for each of the three I/Os"
