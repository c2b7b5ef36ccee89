"""The guest's payload: 32-bit machine code for flat protected mode, as bytes with the listing that they come from.

Each line of ``LISTING`` is offset, bytes, and the source that they were assembled from (`tests/kvm/listing.py` does it
again where there is an assembler).  It uses only what a KVM that emulates ring 0 can do: no ``iret``.  Interrupts are on
in ``hlt``, ``poll`` and ``window`` alone, so a handler has nothing to go back to: it drops the frame and asks for the next op.

The payload does what the mailbox asks: it stores to the doorbell, loads and stores registers, idles, takes interrupts.  What it
does next is asked anew each time that it is told to (``next``), never remembered.
"""

from __future__ import annotations

import struct
from enum import IntEnum

__all__ = [
    "APIC_GPA",
    "BASE",
    "CODE",
    "ISR_VECTOR",
    "LINE_VECTOR",
    "LISTING",
    "MEMORY_MOST",
    "MSI_VECTORS",
    "PORT_DONE",
    "PORT_IRQ",
    "REGISTERS_GPA",
    "Mail",
    "Op",
    "image",
    "source",
]

BASE = 0xE000_0000
"""Guest-physical address of the payload's slot: code, tables, stack, mailbox; the device's words in a slot behind it."""
TABLES_AT, STACK_AT, MAILBOX_AT, WORDS_AT = 0x1000, 0x2000, 0x3000, 0x4000
SLOT_BYTES = WORDS_AT
MEMORY_MOST = 0xC000_0000
"""Guest memory ends below the payload, the registers and the APICs, which a 32-bit guest must reach."""
REGISTERS_GPA = 0xE010_0000
APIC_GPA, IOAPIC_GPA = 0xFEE0_0000, 0xFEC0_0000
LINE_VECTOR, ISR_VECTOR = 0x30, 0x2F
MSI_VECTORS = range(0x31, 0x41)
PORT_DONE, PORT_IRQ = 0x10, 0x11
SENT_AT, SENT_STRIDE = 8, 5
"""The device's page, in 32-bit words: how often message n was sent is at SENT_AT + SENT_STRIDE n."""

LISTING = """\
000  bb003000e0            start:  mov  ebx, 0xe0003000            # the mailbox
005  bf004000e0                    mov  edi, 0xe0004000            # the device's counts: causes raised (VRING, CONFIG), messages sent
00a  be000010e0                    mov  esi, 0xe0100000            # the registers of virtio-mmio
00f  bd0000e0fe                    mov  ebp, 0xfee00000            # the local APIC
014  8b4b04                next:   mov  ecx, [ebx+0x04]            # addr
017  8b03                          mov  eax, [ebx]                 # op; interrupts are off
019  ff2485770100e0                jmp  [eax*4+ops]
020  fb                    hlt:    sti                             # op 0: idle in the kernel until an interrupt comes
021  f4                            hlt
022  fa                            cli                             # a kick ends up here
023  ebef                          jmp  next
025  fb                    poll:   sti                             # op 1: idle in guest mode
026  f390                  spin:   pause
028  833b01                        cmp  dword ptr [ebx], 1
02b  74f9                          je   spin
02d  fa                            cli
02e  ebe4                          jmp  next
030  0fb601                load1:  movzx eax, byte ptr [ecx]       # op 2: a load, one exit; the result goes to the mailbox
033  eb07                          jmp  loaded
035  0fb701                load2:  movzx eax, word ptr [ecx]       # op 3
038  eb02                          jmp  loaded
03a  8b01                  load4:  mov  eax, [ecx]                 # op 4
03c  89430c                loaded: mov  [ebx+0x0c], eax
03f  e610                  tell:   out  0x10, al                   # done: back to whoever asked
041  ebd1                          jmp  next
043  8b4308                store1: mov  eax, [ebx+0x08]            # op 5: a store, told when it is done
046  8801                          mov  [ecx], al
048  ebf5                          jmp  tell
04a  8b4308                store2: mov  eax, [ebx+0x08]            # op 6
04d  668901                        mov  [ecx], ax
050  ebed                          jmp  tell
052  8b4308                store4: mov  eax, [ebx+0x08]            # op 7
055  8901                          mov  [ecx], eax
057  ebe6                          jmp  tell
059  8b4308                ring2:  mov  eax, [ebx+0x08]            # op 8: the doorbell, counted
05c  ff4310                        inc  dword ptr [ebx+0x10]
05f  8b5314                        mov  edx, [ebx+0x14]            # read before the store: after an exit there it is the next op's
062  668901                        mov  [ecx], ax
065  eb0b                          jmp  rung
067  8b4308                ring4:  mov  eax, [ebx+0x08]            # op 9
06a  ff4310                        inc  dword ptr [ebx+0x10]
06d  8b5314                        mov  edx, [ebx+0x14]
070  8901                          mov  [ecx], eax
072  85d2                  rung:   test edx, edx
074  749e                          jz   next
076  ebc7                          jmp  tell
078  fb                    window: sti                             # op 10: take what is pending
079  e612                          out  0x12, al                   # the entry after this exit does; an emulated sti may look much later
07b  fa                            cli
07c  ebc1                          jmp  tell
07e  0f31                  stamp:  rdtsc                           # op 11: what time is it?
080  894320                        mov  [ebx+0x20], eax
083  895324                        mov  [ebx+0x24], edx
086  ebb7                          jmp  tell
088  0f31                  isr:    rdtsc                           # the line of virtio-pci
08a  894320                        mov  [ebx+0x20], eax
08d  895324                        mov  [ebx+0x24], edx
090  8b5338                        mov  edx, [ebx+0x38]
093  0fb602                        movzx eax, byte ptr [edx]       # ISR status: an exit, which acknowledges too
096  85c0                          test eax, eax
098  7430                          jz   none
09a  eb12                          jmp  causes
09c  0f31                  irq:    rdtsc                           # the line of virtio-mmio
09e  894320                        mov  [ebx+0x20], eax
0a1  895324                        mov  [ebx+0x24], edx
0a4  8b4660                        mov  eax, [esi+0x60]            # InterruptStatus: an exit
0a7  85c0                          test eax, eax
0a9  741f                          jz   none
0ab  894664                        mov  [esi+0x64], eax            # InterruptACK: another; the device lowers the line
0ae  094318                causes: or   [ebx+0x18], eax
0b1  8b07                          mov  eax, [edi]
0b3  034704                        add  eax, [edi+4]
0b6  89c1                          mov  ecx, eax
0b8  2b4b3c                        sub  ecx, [ebx+0x3c]            # raised since the interrupt before this one
0bb  89433c                        mov  [ebx+0x3c], eax
0be  014b2c                        add  [ebx+0x2c], ecx            # seen
0c1  49                            dec  ecx
0c2  014b30                        add  [ebx+0x30], ecx            # coalesced
0c5  e996000000                    jmp  taken
0ca  ff4334                none:   inc  dword ptr [ebx+0x34]       # spurious: not ours, or served by the handler's run before
0cd  c785b000000000000000          mov  dword ptr [ebp+0xb0], 0
0d7  83c40c                        add  esp, 12
0da  e935ffffff                    jmp  next
0df  e84b000000            msis:   call msi                        # message n of 16 comes in at msis + 5 n
0e4  e846000000                    call msi
0e9  e841000000                    call msi
0ee  e83c000000                    call msi
0f3  e837000000                    call msi
0f8  e832000000                    call msi
0fd  e82d000000                    call msi
102  e828000000                    call msi
107  e823000000                    call msi
10c  e81e000000                    call msi
111  e819000000                    call msi
116  e814000000                    call msi
11b  e80f000000                    call msi
120  e80a000000                    call msi
125  e805000000                    call msi
12a  e800000000                    call msi
12f  0f31                  msi:    rdtsc
131  894320                        mov  [ebx+0x20], eax
134  895324                        mov  [ebx+0x24], edx
137  59                            pop  ecx
138  81e9e40000e0                  sub  ecx, offset msis+5         # 5 n
13e  8b448f20                      mov  eax, [edi+ecx*4+0x20]
142  89c2                          mov  edx, eax
144  2b948b84000000                sub  edx, [ebx+ecx*4+0x84]      # sent since the one before
14b  89848b84000000                mov  [ebx+ecx*4+0x84], eax
152  01532c                        add  [ebx+0x2c], edx            # seen
155  4a                            dec  edx
156  015330                        add  [ebx+0x30], edx            # coalesced
159  ff848b80000000                inc  dword ptr [ebx+ecx*4+0x80] # taken, by message
160  ff4328                taken:  inc  dword ptr [ebx+0x28]
163  c785b000000000000000          mov  dword ptr [ebp+0xb0], 0    # EOI
16d  83c40c                        add  esp, 12                    # drop the frame: eip, cs, eflags
170  e611                          out  0x11, al                   # tell of the interrupt
172  e99dfeffff                    jmp  next
177  200000e0              ops:    .long hlt
17b  250000e0                      .long poll
17f  300000e0                      .long load1
183  350000e0                      .long load2
187  3a0000e0                      .long load4
18b  430000e0                      .long store1
18f  4a0000e0                      .long store2
193  520000e0                      .long store4
197  590000e0                      .long ring2
19b  670000e0                      .long ring4
19f  780000e0                      .long window
1a3  7e0000e0                      .long stamp
"""


class Op(IntEnum):
    """What the mailbox asks for, in the order of the table ``ops``."""

    HLT, POLL, LOAD1, LOAD2, LOAD4, STORE1, STORE2, STORE4, RING2, RING4, WINDOW, STAMP = range(12)


class Mail(IntEnum):
    """The 32-bit words of the mailbox, as places in it; the first three and TELL are ours to write, the rest is the payload's."""

    OP, ADDR, VALUE, RESULT, RUNG, TELL, CAUSES = range(7)
    TSC = 8  # two words
    TAKEN, SEEN, COALESCED, SPURIOUS = 10, 11, 12, 13
    ISR_GPA = 14  # ours: where the ISR status of virtio-pci is
    BY_MESSAGE = 32  # every fifth word: how often each message was taken


def _code() -> bytes:
    return b"".join(bytes.fromhex(line.split()[1]) for line in LISTING.splitlines())


def source() -> str:
    """The assembler's input, in Intel syntax, without the offsets and bytes."""
    return "\n".join(line[SOURCE_COLUMN:] for line in LISTING.splitlines())


SOURCE_COLUMN = 27
CODE = _code()


def offset_of(label: str) -> int:
    """Where ``label`` lies in ``CODE``."""
    return next(int(line[:3], 16) for line in LISTING.splitlines() if line[SOURCE_COLUMN:].startswith(f"{label}:"))


_FLAT_CODE, _FLAT_DATA = 0x00CF9B00_0000FFFF, 0x00CF9300_0000FFFF
CODE_SELECTOR, DATA_SELECTOR = 8, 16
IDT_BYTES, GDT_BYTES = 256 * 8, 3 * 8
IDT_GPA, GDT_GPA = BASE + TABLES_AT, BASE + TABLES_AT + IDT_BYTES
MAILBOX_GPA, WORDS_GPA, STACK_TOP = BASE + MAILBOX_AT, BASE + WORDS_AT, BASE + MAILBOX_AT


def image() -> bytes:
    """What the payload's slot holds at first: code, an IDT with a gate for the line and one for each message, a flat GDT."""
    slot = bytearray(SLOT_BYTES)
    slot[: len(CODE)] = CODE
    handlers = {LINE_VECTOR: offset_of("irq"), ISR_VECTOR: offset_of("isr")}
    handlers |= {vector: offset_of("msis") + 5 * n for n, vector in enumerate(MSI_VECTORS)}
    for vector, offset in handlers.items():
        handler = BASE + offset
        struct.pack_into("<HHBBH", slot, TABLES_AT + 8 * vector, handler & 0xFFFF, CODE_SELECTOR, 0, 0x8E, handler >> 16)
    struct.pack_into("<QQQ", slot, TABLES_AT + IDT_BYTES, 0, _FLAT_CODE, _FLAT_DATA)
    return bytes(slot)
