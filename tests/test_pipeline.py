"""A recipe: what it takes, what it refuses and by which name, and that nothing leaks from one boot to the next."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

import vblklab as vb

Steps = Generator[Any, int, Any]
PARTS = ("app", "iostack", "driver", "queue", "transport", "kvm", "device", "engine", "host_iostack", "disk")


def small(**parts: Any) -> vb.Pipeline:
    app = vb.Fio(rw="randrw", bs=4096, iodepth=4, number_ios=40, size="1m")
    return vb.Pipeline(**({"app": app, "disk": vb.Ram(1 << 20)} | parts))


# -- parts that cannot be ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"app": None}, "app=None is not a app: give for example vb.Fio"),
        ({"app": vb.Fio}, "app=Fio is a class, not a app"),
        ({"device": vb.VirtioBlkDriver}, "is not a device: give for example vb.VirtioBlkDevice"),
        ({"driver": vb.VirtioBlkDevice()}, "is not a driver: give for example vb.VirtioBlkDriver"),
        ({"disk": "disk.img"}, "disk='disk.img' is not a disk: give for example"),
        ({"disk": vb.Ram}, "disk=Ram is a class, not a disk"),
        ({"disk": vb.ImageFile}, "disk=ImageFile is a class"),
        ({"queue": 256}, r"queue=256 is not a queue: give for example vb\.Split"),
        ({"queue": vb.Split}, "queue=Split is a class"),
        ({"engine": "sync"}, r"engine='sync' is not a engine: .* vb\.Sync"),
        ({"kvm": "ioeventfd"}, "kvm='ioeventfd' is not a kvm"),
        ({"transport": "mmio"}, "transport='mmio' is not a transport"),
        ({"transport": vb.Split()}, "is not a transport: give for example vb.Mmio"),
        ({"iostack": 5}, "iostack=5 is not a iostack"),
        ({"host_iostack": None}, "host_iostack=None is not a host_iostack"),
    ],
)
def test_a_part_in_the_wrong_place_is_named_with_an_example_of_the_right_one(part: dict[str, Any], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        vb.Pipeline(**part)
    with pytest.raises(vb.ConfigError, match=message):
        vb.Pipeline().replace(**part)


@pytest.mark.parametrize("name", ["devise", "Device", "", "machine"])
def test_an_unknown_part_is_refused_with_the_names_of_the_parts(name: str) -> None:
    with pytest.raises(vb.ConfigError, match=f"no part '{name}': the parts are app, iostack, driver, queue"):
        vb.Pipeline().replace(**{name: 1})
    with pytest.raises(vb.ConfigError, match=f"no part '{name}': the parts are app, iostack, driver, queue"):
        vb.Pipeline(**{name: 1})


def test_the_constructor_still_shows_its_parts() -> None:
    assert list(inspect.signature(vb.Pipeline).parameters)[:3] == ["app", "iostack", "driver"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vb.Kvm(kick="hypercall"), "kvm kick='hypercall': choose ioeventfd or mmio-exit"),
        (lambda: vb.Pci(vectors=-1), "pci vectors=-1: use 0 to 2048"),
        (lambda: vb.Kvm(call="smoke"), "kvm call='smoke': choose irqfd, msi or intx"),
        (lambda: vb.Kvm(vcpus=0), "kvm vcpus=0: use 1 to 64"),
        (lambda: vb.Kvm(kick="mmio-exit", iothread=True), "an iothread is woken by an ioeventfd"),
        (lambda: vb.Split(100), "queue size 100: a split virtqueue takes a power of two"),
        (lambda: vb.Split(65536), "queue size 65536"),
        (lambda: vb.Split(4.0), r"queue size 4\.0"),
        (lambda: vb.Ram(1000), "Ram size=1000 bytes: give a multiple of 512"),
        (lambda: vb.Nvme(size=0), "Nvme size=0 bytes"),
        (lambda: vb.Nvme(model="P5800X"), "Nvme model='P5800X': the cost table knows P4800X, P3700"),
        (lambda: vb.Nvme(queue_depth=0), "queue_depth=0: use 1 to 65535"),
        (lambda: vb.Nvme(read_us=-1), "read_us=-1: a latency is 0 or more"),
        (lambda: vb.ImageFile("x.img", on="floppy"), "ImageFile on='floppy'"),
        (lambda: vb.VirtioBlkDevice(queues=0), "device queues=0: use 1 to 1024"),
        (lambda: vb.VirtioBlkDevice(block_size=1000), "device block_size=1000: use a power of two"),
        (lambda: vb.VirtioBlkDevice(queue_size_max=1000), "device queue_size_max=1000"),
        (lambda: vb.VirtioBlkDevice(serial="x" * 21), "at most 20 bytes"),
        (lambda: vb.VirtioBlkDevice(size_max=100), "device size_max=100"),
        (lambda: vb.VirtioBlkDevice(seg_max=0), "device seg_max=0"),
        (lambda: vb.VirtioBlkDriver(queues=0), "driver queues=0"),
        (lambda: vb.Fio(segment_bytes=0), "segment_bytes=0"),
    ],
)
def test_an_option_that_cannot_be_names_itself_and_the_remedy(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"queue": vb.Split(2), "device": vb.VirtioBlkDevice(indirect=False)}, "a queue of 2 entries"),
        ({"app": vb.Fio(bs=512), "device": vb.VirtioBlkDevice(block_size=4096)}, "on a disk of 4096-byte blocks: use multiples of 4096"),
        ({"app": vb.Fio(rw="randwrite"), "device": vb.VirtioBlkDevice(read_only=True)}, "on a read-only disk"),
        ({"app": vb.Fio(rw="randtrim"), "device": vb.VirtioBlkDevice(discard=False)}, "does not discard: use a device with discard=True"),
        ({"app": vb.Fio(size="1g")}, "size=1g at offset 0 is bytes 0 to 1073741824 of a disk of 1048576"),
        ({"device": vb.VirtioBlkDevice(queues=64, seg_max=60000), "queue": vb.Split(1024)}, "needs 58 GiB of guest memory"),
        ({"app": vb.Fio(bs="64k", segment_bytes=100), "iostack": vb.IOStack(max_segments=3)}, "3 segments do not hold one block"),
        ({"disk": vb.ImageFile("does/not/exist.img")}, "'does/not/exist.img' does not exist: make one: truncate"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("machine", [vb.SimMachine, vb.LiveMachine])
def test_a_combination_that_cannot_be_is_refused_by_both_machines(parts: dict[str, Any], message: str, machine: type) -> None:
    with pytest.raises(vb.VblkError, match=message):
        small(**parts).run(machine() if machine is vb.SimMachine else machine(device="thread"))


@pytest.mark.parametrize("machine", [None, "sim", 5, vb.Fio])
def test_what_is_no_machine_is_refused(machine: Any) -> None:
    with pytest.raises(vb.ConfigError, match=r"is not a machine: give for example vb\.SimMachine\(\) or vb\.LiveMachine\(\)"):
        small().boot(machine)


def test_a_machine_may_be_given_as_its_class() -> None:
    assert small().run(vb.SimMachine).ios == 40


# -- by text -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part", "repr_"),
    [
        ("kvm.kick=mmio-exit", "kvm", "kick='mmio-exit'"),
        ("kvm.vcpus=2", "kvm", "vcpus=2"),
        ("kvm.iothread=no", "kvm", "iothread=False"),
        ("kvm.vcpus=none", "kvm", "vcpus=None"),
        (" kvm.call = intx ", "kvm", "call='intx'"),
        ("queue=128", "queue", "Split(size=128)"),
        ("queue.size=1k", "queue", "Split(size=1024)"),
        ("disk=ram", "disk", "Ram(size=67108864)"),
        ("disk=a=b.img", "disk", "path='a=b.img'"),
        ("disk.size=1m", "disk", "Nvme(size=1048576"),
        ("disk.model=P3700", "disk", "model='P3700'"),
        ("disk.read_us=7.5", "disk", "read_us=7.5"),
        ("device.queues=4", "device", "VirtioBlkDevice(queues=4)"),
        ("device.serial=12", "device", "serial='12'"),
        ("device.serial=yes", "device", "serial='yes'"),
        ("device.block_size=4k", "device", "block_size=4096"),
        ("device.event_idx=off", "device", "event_idx=False"),
        ("driver.poll=yes", "driver", "poll=True"),
        ("driver.features=0x10000000", "driver", "features=0x110000000"),
        ("iostack.max_sectors=8", "iostack", "max_sectors=8"),
        ("iostack.merge=no", "iostack", "merge=False"),
        ("host_iostack.nr_requests=1", "host_iostack", "nr_requests=1"),
        ("engine=sync", "engine", "Sync()"),
        ("engine=simulated", "engine", "Simulated()"),
    ],
)
def test_a_part_is_set_by_text(text: str, part: str, repr_: str) -> None:
    before = vb.Pipeline()
    after = before.set(text)
    assert repr_ in after.describe()[part]
    assert {name: value for name, value in after.describe().items() if name != part} == {
        name: value for name, value in before.describe().items() if name != part
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kvm.kick=hypercall", "kvm kick='hypercall'"),
        ("kvm.vcpus=two", "kvm.vcpus='two': give a whole number"),
        ("kvm.vcpus=yes", "kvm.vcpus='yes': give a whole number"),
        ("kvm.iothread=maybe", "kvm.iothread='maybe': use yes or no"),
        ("kvm.colour=red", "kvm has no option 'colour': it has kick, call, vcpus, iothread"),
        ("kvm=", "part 'kvm' takes no plain value"),
        ("kvm", r"write part=value or part\.option=value"),
        ("", r"write part=value or part\.option=value"),
        ("cpu.kick=1", "no part 'cpu'"),
        ("queue=lots", "part 'queue' takes no plain value"),
        ("queue=100", "queue size 100"),
        ("disk.read_us=fast", "disk.read_us='fast': give a number"),
        ("disk.size=1000", "Nvme size=1000 bytes"),
        ("device.block_size=big", "device.block_size='big': give a whole number"),
        ("device.event_idx=5", "device.event_idx='5': use yes or no"),
        ("driver.poll=7", "driver.poll='7': use yes or no"),
        ("engine=uring", "no engine 'uring': choose one of simulated, sync, threads, mmap, io_uring"),
        ("engine.depth=5", "engine has no option 'depth'"),
        ("transport.irqs=2", "transport has no option 'irqs': it has none"),
        ("app.iodepth=5", "the application comes from the job file"),
    ],
)
def test_text_that_cannot_be_set_names_part_option_and_remedy(text: str, message: str) -> None:
    with pytest.raises(vb.ConfigError, match=message):
        vb.Pipeline().set(text)


def test_setting_one_option_keeps_the_others() -> None:
    recipe = vb.Pipeline(
        device=vb.VirtioBlkDevice(queues=3, serial="abc", write_cache=False),
        driver=vb.VirtioBlkDriver(queues=2, features=1 << 28),
        iostack=vb.IOStack(max_segments=5),
        kvm=vb.Kvm(vcpus=3),
        disk=vb.Nvme(size=1 << 20, model="P3700"),
    )
    for text in ("device.block_size=4096", "driver.poll=yes", "iostack.max_sectors=64", "kvm.call=intx", "disk.queue_depth=7"):
        recipe = recipe.set(text)
    described = recipe.describe()
    for part, words in {
        "device": ("queues=3", "serial='abc'", "write_cache=False", "block_size=4096"),
        "driver": ("queues=2", "features=0x110000000", "poll=True"),
        "iostack": ("max_segments=5", "max_sectors=64"),
        "kvm": ("vcpus=3", "call='intx'"),
        "disk": ("size=1048576", "model='P3700'", "queue_depth=7"),
    }.items():
        for word in words:
            assert word in described[part]


class Chatty(vb.VirtioBlkDevice):
    """A learner's device."""

    def should_notify(self, queue: Any) -> bool:
        return True


@pytest.mark.parametrize("device", [Chatty, Chatty(queues=2)], ids=["class", "instance"])
def test_setting_an_option_of_a_learners_class_keeps_the_class(device: Any) -> None:
    recipe = small(device=device).set("device.serial=mine")
    assert type(recipe.device) is Chatty and recipe.device.serial == "mine"
    assert recipe.run(vb.SimMachine()).errors == 0


# -- a recipe is frozen and shared by nobody ---------------------------------------------------------------------------------------------


def test_replace_gives_another_recipe_and_leaves_the_original_alone() -> None:
    first = small()
    before = first.describe()
    second = first.replace(kvm=vb.Kvm(kick="mmio-exit"), queue=vb.Split(8))
    assert second is not first and first.describe() == before
    assert second.kvm.kick == "mmio-exit" and second.app is first.app
    with pytest.raises(FrozenInstanceError):
        first.kvm = vb.Kvm()  # type: ignore[misc]
    assert first.replace() == first


class Counts(vb.VirtioBlkDevice):
    """Keeps state, as learners' devices do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[int] = []

    def handle_request(self, request: Any) -> Steps:
        self.seen.append(request.sector)
        yield from super().handle_request(request)


@pytest.mark.parametrize("as_class", [True, False])
def test_two_boots_share_nothing(as_class: bool) -> None:
    device = Counts if as_class else Counts(serial="x")
    recipe = small(device=device, iostack=vb.IOStack(max_sectors=64), driver=vb.VirtioBlkDriver(), engine=vb.Sync())
    first, second = recipe.boot(vb.SimMachine()), recipe.boot(vb.SimMachine())
    for part in ("device", "driver", "iostack", "engine", "memory", "store", "registers", "transport", "scheduler"):
        assert getattr(first, part) is not getattr(second, part), part
    before = [bytes(second.memory.bytes), second.now_ns]
    first.run()
    assert [bytes(second.memory.bytes), second.now_ns] == before and second.device.seen == []
    assert bytes(first.store.bytes) != bytes(1 << 20) == bytes(second.store.bytes)
    second.run()
    assert len(first.device.seen) == len(second.device.seen) == 40
    if not as_class:
        assert device.seen == [] and not hasattr(device, "queues"), "the recipe's own part was never wired"


def test_two_machines_may_be_stepped_in_turn() -> None:
    alone = small().run(vb.SimMachine(trace=True))
    one, two = small().boot(vb.SimMachine()), small().boot(vb.SimMachine())
    events: list[list[Any]] = [[], []]
    while not (one.finished and two.finished):
        for vm, mine in zip((one, two), events, strict=True):
            if (event := vm.step()) is not None:
                mine.append(event)
    expected = [event for event in alone.trace or () if event.key != "wait"]
    assert events[0] == expected and events[1] == expected


@pytest.mark.parametrize("disk", [vb.Ram(1 << 20), vb.Nvme(size=1 << 20)])
def test_a_disk_without_a_file_is_zero_at_every_boot(disk: Any) -> None:
    recipe = small(disk=disk)
    for _ in range(2):
        vm = recipe.boot(vb.SimMachine())
        assert bytes(vm.store.bytes) == bytes(1 << 20)
        vm.run()
        assert bytes(vm.store.bytes) != bytes(1 << 20)


# -- what it says ------------------------------------------------------------------------------------------------------------------------


def test_describe_names_every_part_in_the_order_of_the_path() -> None:
    described = small(device=Chatty).describe()
    assert tuple(described) == PARTS
    assert described["engine"] == "the machine's own"
    assert described["device"] == "Chatty" and described["kvm"].startswith("Kvm(kick='ioeventfd'")
    assert "randrw" in described["app"] and "iodepth=4" in described["app"]


def test_repr_is_a_line_a_part_and_html_a_row_a_part() -> None:
    recipe = small(device=vb.VirtioBlkDevice(serial="<b>&"))
    lines = repr(recipe).splitlines()
    assert lines[0] == "Pipeline(" and lines[-1] == ")" and [line.split()[0] for line in lines[1:-1]] == list(PARTS)
    page = recipe._repr_html_()
    assert page.count("<tr>") == len(PARTS)
    assert "<b>&'" not in page and "&lt;b&gt;&amp;" in page


def test_a_run_carries_its_recipe() -> None:
    recipe = small(queue=vb.Split(32))
    assert recipe.run(vb.SimMachine()).recipe == recipe.describe()


def test_the_boot_of_a_missing_image_names_it(tmp_path: Path) -> None:
    with pytest.raises(vb.DiskError, match=f"{tmp_path}/none.img"):
        small(disk=vb.ImageFile(str(tmp_path / "none.img"))).boot(vb.SimMachine())
