"""The driver resets one queue in the middle of a run, with other sizes and again: every I/O ends once, with its bytes (§2.6)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest

import vblklab as vb

Steps = Generator[Any, int, Any]
QUEUES = [vb.Split(64), vb.Split(64, in_order=True), vb.Packed(64), vb.Packed(64, in_order=True)]
TRANSPORTS = [vb.Mmio(), vb.Pci()]


def boot(queue: Any, transport: Any = TRANSPORTS[0], *, kick: str = "ioeventfd", poll: bool = False, **machine: Any) -> Any:
    app = vb.Fio(rw="randrw", bs=4096, iodepth=16, number_ios=250, verify="crc32", numjobs=2)
    recipe = vb.Pipeline(
        app=app,
        queue=queue,
        transport=transport,
        device=vb.VirtioBlkDevice(ring_reset=True, seg_max=6, queues=2),
        kvm=vb.Kvm(kick=kick, vcpus=2),
        driver=vb.VirtioBlkDriver(poll=poll),
    )
    return recipe.boot(vb.SimMachine(**machine))


def disturb(vm: Any, sizes: Sequence[int | None], queue: int = 0, every_ns: int = 90_000) -> list[tuple[int, int]]:
    """Reset a queue so many times; how many buffers were in flight at each and how many the other queue used meanwhile."""
    seen: list[tuple[int, int]] = []

    def resets() -> Steps:
        for size in sizes:
            yield vb.Wait(vm.now_ns + every_ns)
            in_flight = vm.driver.queues[queue].size - vm.driver.queues[queue].num_free
            before = vm.device.queues[1 - queue].used_idx
            yield from vm.driver.reset_queue(queue, size)
            seen.append((in_flight, vm.device.queues[1 - queue].used_idx - before))

    vm.scheduler.add("reset", vm.vcpus[0], resets(), task=True).notify()
    return seen


def ended_whole(vm: Any, run: Any) -> None:
    assert (run.ios, run.errors, run.mismatches) == (500, 0, 0)
    assert any(job.verified_ios for job in run.jobs)
    assert all(not task.in_flight for task in vm.tasks)
    for ring, other in zip(vm.driver.queues, (vm.device.queues[n] for n in range(2)), strict=True):
        assert ring.num_free == ring.size == other.size and other.in_flight == 0
    assert all(len(hctx.tags) == len(hctx.requests) for hctx in vm.iostack.queues)


@pytest.mark.clause(
    "BASIC-DRV-020",
    "BASIC-DRV-021",
    "BASIC-DRV-022",
    "MMIO-DRV-023",
    "MMIO-DRV-024",
    "MMIO-DRV-025",
    "PCI-DRV-024",
    "PCI-DRV-025",
    "PCI-DRV-026",
)
@pytest.mark.parametrize("transport", TRANSPORTS, ids=["mmio", "pci"])
@pytest.mark.parametrize("queue", QUEUES, ids=repr)
def test_queues_are_reset_and_resized_under_load(queue: Any, transport: Any) -> None:
    vm = boot(queue, transport)
    seen = disturb(vm, [None, 8, 16, None, 64, 8, 8, 64])
    run = vm.run()
    assert len(seen) == 8 and sum(in_flight > 4 for in_flight, _ in seen) >= 4 and any(others for _, others in seen)
    assert vm.driver.queues[0].size == 64
    ended_whole(vm, run)


@pytest.mark.parametrize("seed", [1, 2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("queue", QUEUES, ids=repr)
def test_queues_are_reset_in_any_order_of_contexts(queue: Any, seed: int) -> None:
    vm = boot(queue, TRANSPORTS[seed % 2], interleave="random", seed=seed)
    seen = disturb(vm, [8, 64, None, 16, 16, 64], queue=seed % 2, every_ns=200_000)
    ended_whole(vm, vm.run())
    assert len(seen) == 6


@pytest.mark.parametrize("options", [{"kick": "mmio-exit"}, {"poll": True}, {"poll": True, "transport": vb.Pci()}], ids=repr)
def test_the_vcpus_thread_or_a_task_that_polls_may_be_inside(options: dict[str, Any]) -> None:
    vm = boot(vb.Split(64), **options)
    seen = disturb(vm, [None, 8, 64])
    ended_whole(vm, vm.run())
    assert len(seen) == 3


@pytest.mark.clause("BASIC-DRV-020", "MMIO-DRV-023", "PCI-DRV-024")
@pytest.mark.parametrize("transport", TRANSPORTS, ids=["mmio", "pci"])
def test_2_6_1_the_driver_does_nothing_with_the_queue_before_the_device_says_that_it_is_reset(transport: Any) -> None:
    vm = boot(vb.Split(64), transport)
    order: list[str] = []
    ring, reset_queue, replacement = vm.driver.queues[0], vm.device.reset_queue, vm.driver._replacement

    def reset(number: int, end: Any) -> None:
        order.append("asked")
        assert vm.device.queues[number].in_flight
        reset_queue(number, lambda: (order.append("let go"), end()))

    def replaced(*args: Any) -> Any:
        order.append("replaced")
        return replacement(*args)

    detach = ring.detach_unused_bufs
    ring.detach_unused_bufs = lambda: (order.append("detached"), detach())[1]
    vm.device.reset_queue, vm.driver._replacement = reset, replaced
    seen = disturb(vm, [None])
    ended_whole(vm, vm.run())
    assert seen[0][0] and order == ["asked", "let go", "detached", "replaced"]


def test_what_cannot_be_reset_says_so() -> None:
    vm = boot(vb.Split(64))

    def first(steps: Steps) -> Any:
        with pytest.raises(vb.ConfigError) as told:
            next(steps)
        return str(told.value)

    driver = vm.driver
    assert "no queue 9" in first(driver.reset_queue(9))
    assert "of 4 entries" in first(driver.reset_queue(0, 4)) and "of 4096 entries" in first(driver.reset_queue(0, 4096))
    assert "power of two" in first(driver.reset_queue(0, 24))
    steps = driver.reset_queue(0)
    next(steps)
    assert "is being reset" in first(driver.reset_queue(1))
    steps.close()
    plain = vb.Pipeline(app=vb.Fio(number_ios=1)).boot(vb.SimMachine())
    assert "ring_reset=True" in first(plain.driver.reset_queue(0))


def test_the_fused_path_says_why_it_is_not_taken() -> None:
    for queue, device, why in (
        (vb.Split(64), vb.VirtioBlkDevice(ring_reset=True), "VIRTIO_F_RING_RESET"),
        (vb.Split(64, in_order=True), vb.VirtioBlkDevice(), "VIRTIO_F_IN_ORDER"),
    ):
        vm = vb.Pipeline(app=vb.Fio(number_ios=1), queue=queue, device=device).boot(vb.SimMachine())
        assert all(why in line for line in vm.explain() if "host irq" not in line)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=["mmio", "pci"])
@pytest.mark.parametrize("queue", [QUEUES[0], QUEUES[3]], ids=repr)
def test_a_queue_is_reset_on_the_live_machine(queue: Any, transport: Any) -> None:
    app = vb.Fio(rw="randrw", bs=4096, iodepth=16, number_ios=400, verify="crc32")
    device = vb.VirtioBlkDevice(ring_reset=True, seg_max=6)
    recipe = vb.Pipeline(app=app, queue=queue, transport=transport, device=device, disk=vb.Ram(16 << 20))
    vm = recipe.boot(vb.LiveMachine())
    ended = []

    def resets() -> Steps:
        for size in (None, 8, 64, None):
            yield from vm.driver.reset_queue(0, size)
            ended.append(size)

    vm.loop.add("guest reset", resets(), task=True).notify()
    run = vm.run()
    assert (run.ios, run.errors, run.mismatches) == (400, 0, 0)
    assert ended == [None, 8, 64, None]
    assert vm.driver.queues[0].num_free == vm.driver.queues[0].size == 64


@pytest.mark.parametrize("late_ns", [0, 5_000])
@pytest.mark.parametrize("queue", QUEUES[::2], ids=repr)
def test_a_restart_and_the_reset_of_a_queue_take_turns(queue: Any, late_ns: int) -> None:
    """Both are walks over the same registers: the restart waits, a reset in the middle of a restart is refused."""
    vm = boot(queue)
    said: list[str] = []

    def resets() -> Steps:
        while vm.driver.failed is None and len(said) < 3:
            yield vb.Wait(vm.now_ns + 30_000)
            try:
                yield from vm.driver.reset_queue(0, 8)
                said.append("reset")
            except vb.ConfigError as error:
                assert "being restarted" in str(error)
                said.append("refused")

    def restarts() -> Steps:
        while vm.driver._replaced is None:
            yield vb.Wait(vm.now_ns + 1_000)
        yield vb.Wait(vm.now_ns + late_ns)
        yield from vm.driver.restart()
        said.append("restarted")

    vm.scheduler.add("reset", vm.vcpus[0], resets(), task=True).notify()
    vm.scheduler.add("restart", vm.vcpus[1], restarts(), task=True).notify()
    run = vm.run()
    assert "restarted" in said and "reset" in said
    assert run.ios == 500 and not run.mismatches and all(not task.in_flight for task in vm.tasks)
    assert vm.driver.failed is None and vm.device.broken is None
