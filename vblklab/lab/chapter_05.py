"""The questions of chapter 05, the virtqueue.  Functions are tried on fresh cases; guesses are judged from runs and films."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

from ..interleave import Schedules
from ..pipeline import Packed
from ..ring.split import need_event
from ..spec.virtio_ring import DESC, DESC_BYTES, PACKED_AVAIL, PACKED_USED, DescFlag
from ..trace.film import Film
from .answers import TREND, a_run, number, one_of, trend
from .careful import tried
from .check import Verdict, Wrong, prediction, question, right, wrong

_RING = one_of(split="the split ring", packed="the packed ring", same="equal neither both")
_Part = tuple[int, int, bool]


def _still_open(result: Any) -> Verdict | None:
    if result is None or result is ... or (isinstance(result, (list, bytes)) and not result):
        return Verdict("open", "Your function returns nothing yet. Write its body, run the cell again.")
    return None


def _a_film(given: Any, what: str) -> Film:
    if not isinstance(given, Film):
        raise Wrong(f"Give {what}: a film, which is what `vb.film(…)` returns.")
    return given


# -- bytes -------------------------------------------------------------------------------------------------------------------


def _chain_in_a_table(rng: random.Random, parts: list[_Part]) -> tuple[bytes, int]:
    """A table of 8 descriptors, full of old ones, in which a chain lies at random slots; and its head."""
    table = bytearray(b"".join(DESC.pack(rng.getrandbits(30), rng.randrange(1, 999), 0, rng.randrange(8)) for _ in range(8)))
    slots = rng.sample(range(8), len(parts))
    for i, (slot, (addr, length, writes)) in enumerate(zip(slots, parts, strict=True)):
        last = i == len(parts) - 1
        flags = (0 if last else DescFlag.NEXT) | (DescFlag.WRITE if writes else 0)
        DESC.pack_into(table, slot * DESC_BYTES, addr, length, flags, rng.randrange(8) if last else slots[i + 1])
    return bytes(table), slots[0]


_PARTS: list[_Part] = [(0x1_0000_1000, 16, False), (0x2000, 4096, True), (0x3008, 512, True), (0x4001, 1, True)]


@question("05", "Which parts of memory does the chain that begins at `head` name? Write `decode(table, head)`.")
def decode_chain(decode: Any) -> Verdict:
    rng = random.Random(5)
    for parts in (_PARTS[:1], _PARTS[:3], _PARTS):
        table, head = _chain_in_a_table(rng, parts)
        found = tried(decode, table, head)
        if (still := _still_open(found)) is not None:
            return still
        found = _as_parts(found)
        if found != parts:
            return wrong(_decode_hint(found, parts, table, head))
    return right("The chain may lie anywhere in the table. Only the flag NEXT says that it goes on, and only `next` says where.")


def _as_parts(found: Any) -> list[_Part]:
    try:
        return [(int(addr), int(length), bool(writes)) for addr, length, writes in found]
    except (TypeError, ValueError):
        raise Wrong("Return a list of tuples (addr, len, device_writes), one for each descriptor of the chain.") from None


def _decode_hint(found: list[_Part], parts: list[_Part], table: bytes, head: int) -> str:
    addresses = [part[0] for part in found]
    if addresses[0] != parts[0][0]:
        if addresses[0] == int.from_bytes(table[head * DESC_BYTES : head * DESC_BYTES + 8], "big"):
            return "The numbers are read from the wrong end: all fields are little-endian, which `struct` writes as `<`."
        if addresses[0] == DESC.unpack_from(table, 0)[0]:
            return "You begin at slot 0. The chain begins at slot `head`, and a descriptor has 16 bytes."
        return (
            "Your first address is not the one at `head`. Its descriptor begins at byte `16 * head`: 8 bytes addr, 4 len, 2 flags, 2 next."
        )
    if len(found) < len(parts) and found == parts[: len(found)]:
        return f"You stop after {len(found)} of {len(parts)} descriptors. While the flag NEXT (1) is set, the chain goes on."
    if len(found) > len(parts) and found[: len(parts)] == parts:
        return "You follow `next` of the last descriptor as well. Without the flag NEXT that field means nothing."
    if addresses == [part[0] for part in parts]:
        if [part[1] for part in found] != [part[1] for part in parts]:
            return "The addresses are right, the lengths are not: `len` has 4 bytes and stands behind the 8 bytes of `addr`."
        return "Addresses and lengths are right. The third value says whether the device writes there: the flag WRITE, which is 2."
    if len(found) > 1 and addresses[1] == DESC.unpack_from(table, (head + 1) % 8 * DESC_BYTES)[0]:
        return "You take the neighbour. The next descriptor of a chain is at the slot that `next` names."
    return "The first descriptor is right, a later one is not. Read `flags` and `next` again in every descriptor of the chain."


@question("05", "What are the bytes of a chain at the slots 0, 1, 2 …? Write `encode(parts)`.")
def encode_chain(encode: Any) -> Verdict:
    for parts in (_PARTS[:3], _PARTS[:1], _PARTS):
        data = tried(encode, list(parts))
        if (still := _still_open(data)) is not None:
            return still
        if not isinstance(data, (bytes, bytearray)):
            return wrong(f'Return bytes. This is a `{type(data).__name__}`; `struct.pack` makes bytes, and `b"".join(…)` joins them.')
        if hint := _encode_hint(bytes(data), parts):
            return wrong(hint)
    return right("A device can work with these bytes. Nothing else tells it where the data is: 16 bytes a buffer.")


def _encode_hint(data: bytes, parts: list[_Part]) -> str:
    count = len(parts)
    if len(data) != count * DESC_BYTES:
        return f"{count} descriptors have {count * DESC_BYTES} bytes, yours have {len(data)}. The layout `<QIHH` gives 16 each."
    for slot, (addr, length, writes) in enumerate(parts):
        raw = data[slot * DESC_BYTES : (slot + 1) * DESC_BYTES]
        found = DESC.unpack(raw)
        last = slot == count - 1
        if found[0] != addr:
            swapped = struct.unpack(">QIHH", raw)[0] == addr
            return (
                "The bytes are in the wrong order: little-endian is wanted."
                if swapped
                else f"`addr` of descriptor {slot} is {found[0]:#x}."
            )
        if found[1] != length:
            return f"`len` of descriptor {slot} should be {length} and is {found[1]}."
        if bool(found[2] & DescFlag.NEXT) is last:
            return "The last descriptor must not have the flag NEXT." if last else f"Descriptor {slot} needs the flag NEXT: others follow."
        if bool(found[2] & DescFlag.WRITE) is not writes:
            return f"Descriptor {slot}: the flag WRITE (2) says that the device writes there. Here it {'does' if writes else 'does not'}."
        if found[2] & ~(DescFlag.NEXT | DescFlag.WRITE):
            return f"Descriptor {slot} has a flag that no one asked for: flags = {found[2]}."
        if not last and found[3] != slot + 1:
            return f"`next` of descriptor {slot} should name slot {slot + 1} and names {found[3]}."
    return ""


# -- indices -----------------------------------------------------------------------------------------------------------------


@question("05", "How many buffers are with the device? Write `waiting(avail_idx, used_idx)`.")
def index_wrap(waiting: Any) -> Verdict:
    for used in (0, 3, 250, 40_000, 65_530, 65_535):
        for ahead in (0, 1, 2, 8, 200):
            avail = (used + ahead) & 0xFFFF
            found = tried(waiting, avail, used)
            if (still := _still_open(found)) is not None:
                return still
            if found == ahead:
                continue
            case = f"avail.idx is {avail} and used.idx {used}"
            if avail < used:
                return wrong(f"While {case}, you say {found!r}. The index has 16 bits: behind 65535 comes 0, and the count goes on.")
            return wrong(f"While {case}, you say {found!r}. Both only count up: one what was offered, the other what came back.")
    return right("A difference modulo 65536. It never matters how often the indices went round, nor how large the ring is.")


@question("05", "Should the other side be told? Write `asked(event, new, old)`.")
def event_between(asked: Any) -> Verdict:
    cases = [((base + event) & 0xFFFF, (base + new) & 0xFFFF, base) for base in (0, 65_533) for new in range(5) for event in range(-2, 6)]
    wrong_near_wrap = False
    for event, new, old in ((event & 0xFFFF, new, old) for event, new, old in cases):
        found = tried(asked, event, new, old)
        if (still := _still_open(found)) is not None:
            return still
        truth = need_event(event, new, old)
        if bool(found) is truth:
            continue
        wrong_near_wrap = new < old
        case = f"the index went from {old} to {new} and the event word says {event}"
        if wrong_near_wrap:
            return wrong(f"It is right until the index wraps: {case}. Take every difference modulo 65536.")
        if new == old:
            return wrong(f"Nothing was added ({case}), so there is nothing to tell.")
        if event == (new & 0xFFFF):
            return wrong(
                f"When {case}: the entry {event} is still empty. Entries {old} to {new - 1} are new; the event word names an entry."
            )
        if event == old:
            return wrong(f"When {case}: the entry {event} is the first new one, and it was asked for.")
        return wrong(f"When {case}, the answer is {truth}. Is the named entry one of the new ones, {old} to {new - 1}?")
    return right("This is `vring_need_event()` of Linux in your words. The other side is told once, at the entry it named.")


@prediction("05", "EVENT_IDX off: more, fewer or the same number of kicks?", read=TREND)
def predict_kicks(guess: str, with_event_idx: Any, without: Any) -> Verdict:
    runs = [a_run(run, "both runs") for run in (with_event_idx, without)]
    (old, new), (first, then) = ([run.counters[name] / run.ios * 1000 for run in runs] for name in ("kicks", "interrupts"))
    truth = trend(old, new)
    said = f"{truth.capitalize()}: {old:,.0f} kicks for 1,000 I/Os, then {new:,.0f}. Interrupts: {first:,.0f}, then {then:,.0f}."
    why = "A flag says yes or no until it is changed. An event word says which buffer is worth a kick, and is spent by it."
    return (right if guess == truth else wrong)(f"{said} {why}")


# -- packed ------------------------------------------------------------------------------------------------------------------


@question("05", "Whose is a packed descriptor? Write `state(flags, wrap)`: `available`, `used` or `neither`.")
def packed_state(state: Any) -> Verdict:
    for wrap in (1, 0):
        for avail in (0, 1):
            for used in (0, 1):
                flags = DescFlag.WRITE | PACKED_AVAIL * avail | PACKED_USED * used
                found = tried(state, int(flags), wrap)
                if (still := _still_open(found)) is not None:
                    return still
                truth = "available" if (avail == wrap) and used != wrap else "used" if avail == used == wrap else "neither"
                if found == truth:
                    continue
                case = f"AVAIL {avail}, USED {used}, wrap counter {wrap}"
                if found not in ("available", "used", "neither"):
                    return wrong(f"For {case} your function returns {found!r}. Return one of the three words.")
                if wrap == 0:
                    return wrong(
                        f"In the laps with wrap counter 1 it is right, and wrong for {case}. Compare each bit with the wrap counter."
                    )
                if truth == "neither":
                    return wrong(f"For {case}: AVAIL is not this lap's wrap counter, so nobody has touched the slot in this lap.")
                if found == "neither":
                    return wrong(f"For {case} it is `{truth}`. The bits are 7 (AVAIL, 128) and 15 (USED, 32768) of the flags.")
                return wrong(f"For {case} it is `{truth}`: the driver sets only AVAIL to the wrap counter, the device both.")
    return right("One ring, no index to share: each descriptor says itself whose it is, and one bit a lap keeps old ones apart.")


@prediction("05", "Which ring changes fewer lines of memory for an I/O: `split` or `packed`?", read=_RING)
def predict_lines(guess: str, split: Any, packed: Any) -> Verdict:
    films = _a_film(split, "the film of the split ring first"), _a_film(packed, "the film of the packed ring second")
    if films[0][0].shot.packed or not films[1][0].shot.packed:
        raise Wrong("Give the film of the split ring first and the one of the packed ring second.")
    counts = [film.written() for film in films]
    lines = [(count.driver_lines + count.device_lines) / max(count.ios, 1) for count in counts]
    truth = "same" if abs(lines[0] - lines[1]) < 0.05 * lines[0] else "split" if lines[0] < lines[1] else "packed"
    said = f"{truth.capitalize()}: {lines[0]:.1f} lines for an I/O on the split ring, {lines[1]:.1f} on the packed one."
    why = "The packed ring has one place to write to instead of three; what it saves is the index words and the rings beside the table."
    return (right if guess == truth else wrong)(f"{said} {why}")


# -- a race ------------------------------------------------------------------------------------------------------------------


@question("05", "At which step does the driver decide not to kick, and is wrong?")
def lost_moment(step: Any, found: Any) -> Verdict:
    answer = number(step)
    if not isinstance(found, Schedules) or found.violation is None:
        raise Wrong("Give the step's number and then `found`, which holds the schedule.")
    steps = found.schedule
    published = max(one.number for one in steps if one.who == "driver" and "virtqueue_kick_prepare" in one.points)
    truth = next((one.number for one in steps if one.number > published and one.who == "driver"), published)
    if answer == truth:
        return right(
            "It reads `avail_event` while its own `avail.idx` is still on the way. The device reads the old `avail.idx`, and sleeps. "
            "A fence lets the store arrive before the load."
        )
    if answer == published:
        return wrong(
            f"In step {published} the buffer is published, and `avail.idx` leaves for memory. The decision is the driver's next step."
        )
    if not 1 <= answer <= len(steps) or answer != int(answer):
        return wrong(f"The schedule has the steps 1 to {len(steps)}.")
    if steps[int(answer) - 1].who != "driver":
        return wrong("That step is not the driver's. The first column says who takes a step.")
    if answer < published:
        return wrong("That is before the second buffer is published. The kick that is lost is the second one.")
    return wrong("After that one the driver does nothing more. Look at its last steps.")


# -- the closing question ------------------------------------------------------------------------------------------------------


def _most_in_flight(film: Film) -> int:
    return max(len({mark.request for mark in frame.marks.values() if mark.state == "available"}) for frame in film)


@prediction("05", "How many of 8 requests are ever in flight on a ring of 8 entries without INDIRECT?", read=number)
def predict_in_flight(guess: float, film: Any) -> Verdict:
    truth = _most_in_flight(_a_film(film, "the film without INDIRECT"))
    why = "A read takes three descriptors: header, data, status. What does not fit waits in the driver."
    if guess == truth:
        return right(f"{truth}. {why}")
    return wrong(f"{truth}. {why if guess > truth else 'Chains lie side by side while they fit: three entries each.'}")


@question("05", "What is the smallest packed ring on which all 8 requests are in flight without INDIRECT?")
def smallest_ring(size: Any, filmed: Callable[..., Any]) -> Verdict:
    answer = number(size)
    if answer != int(answer) or not 1 <= answer <= 256:
        return wrong("The size of a packed ring here is a whole number from 1 to 256.")
    if not callable(filmed):
        return wrong("Give the function as well that takes a queue and returns a film.")
    here = _most_in_flight(_a_film(filmed(Packed(int(answer))), "a function that takes a queue and returns a film"))
    if here < 8:
        return wrong(f"With {answer:.0f} entries at most {here} are in flight. How many entries do 8 chains take?")
    if answer > 1 and _most_in_flight(filmed(Packed(int(answer) - 1))) >= 8:
        return wrong(f"{answer:.0f} is enough, and not the smallest.")
    return right(f"{answer:.0f}: three entries for each of 8. A split ring would need 32, because its size must be a power of two.")
