"""The second payload: a bare-metal guest driver for a virtio-blk device on virtio-mmio with a split ring, as bytes with their listing.

It runs a list of requests that lies in guest memory (``REQUEST``) with no help from user space: it builds each request in a slot
(``SLOT``), puts it on the ring, rings the doorbell, idles, takes the interrupt, walks the used ring, checks what was read, and stamps
each request with the time stamp counter.  The control page (``Ctl``) says where everything is.  In ``source()``, what an assembler takes
(`tests/kvm/listing.py`), names with ``c_`` are words of the control page, with ``r_`` and ``t_`` fields and times of a request, with ``s_``
of a slot.

As in `payload.py` nothing but ``hlt`` and ``spin`` runs with interrupts on, so the handler has nothing to go back to and needs no ``iret``.
The two payloads share the mailbox's counts of doorbell stores and interrupts, so whoever runs, they add up.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from .payload import CODE_SELECTOR, GDT_BYTES, GDT_GPA, LINE_VECTOR, STACK_TOP

if TYPE_CHECKING:
    from .vcpu import Vcpu

__all__ = ["BASE", "CODE", "LISTING", "PORT_BROKEN", "REQUEST", "SLOT", "TIMES", "Ctl", "image", "source", "start"]

BASE = 0xE000_8000
"""Guest-physical address of this payload's memory: code, interrupt table, control page."""
TABLE_AT, CONTROL_AT, IMAGE_BYTES = 0x1000, 0x2000, 0x3000
PORT_BROKEN = 0x13


class Ctl(IntEnum):
    """The 32-bit words of the control page, as places in it.  Set before the start; only STOP is written during a run."""

    STOP = 0  # submit nothing more
    NEXT, END, LOW = 1, 2, 3  # addresses in the list: the next request, its end, the first that is not done
    FREE = 4  # the first free slot, 0 for none
    BATCH = 5  # bytes of the list that are published at once
    BATCH_AT = 6
    IN_FLIGHT, COMPLETED = 7, 8
    EVENT_IDX, INDIRECT, POLL, SPIN = 9, 10, 11, 12  # what was negotiated, and how to wait
    DESC, AVAIL, USED, MASK = 13, 14, 15, 16  # the ring; MASK is its size - 1
    USED_EVENT, AVAIL_EVENT, BELL = 17, 18, 19  # addresses
    TOKENS = 20  # head of a chain in flight → its slot, 0 for none
    AVAIL_IDX, LAST_USED, KICKED, DECISIONS = 21, 22, 23, 24
    PUBLISHED, IRQ = 26, 28  # two words each: time stamps
    SHADOW, FIRST = 30, 31  # a word a sector from FIRST on: the write that it belongs to; SHADOW 0 checks nothing
    POOL, SECTORS = 32, 33  # what writes contain: guest/verify.py
    BROKEN = 34


REQUEST = np.dtype(
    [
        *((name, "<u4") for name in ("type", "sector", "bytes", "wait", "stamp", "done", "wrong", "where")),
        *((name, "<u8") for name in ("start", "published", "issued", "irq", "taken")),
        *((name, "<u4") for name in ("rang", "head")),
    ]
)
"""A request of the list.  Ours: type, sector, bytes, ``wait`` (all before this address must be done), ``stamp`` (number of a write).

The guest's: ``done`` (1 + status), ``wrong`` sectors and ``where`` the last of them is, the time stamps, whether it ``rang`` the
doorbell, the ``head`` of its chain.
"""
TIMES = ("start", "published", "issued", "irq", "taken")
SLOT = np.dtype(
    [
        *((name, "<u4") for name in ("next", "request", "head", "link", "descs", "data")),
        ("pad", "<u4", 2),
        ("header", "<u4", 4),
        ("status", "<u4"),
        ("end", "<u4", 3),
    ]
)
"""One of iodepth slots: the next free one, its request, the head of its chain, where its descriptors and its buffer are; then the
request's header and status byte themselves.

``link`` is what its first descriptor says after address and length: flags NEXT, and the next descriptor.
"""

LISTING = """\
000  bb003000e0            start:  mov  ebx, 0xe0003000            # the mailbox: the counts of both payloads
005  bd00a000e0                    mov  ebp, 0xe000a000            # the control page
00a  837d2400                      cmp  dword ptr [ebp+c_event_idx], 0
00e  7508                          jne  submit
010  8b5538                        mov  edx, [ebp+c_avail]         # without EVENT_IDX: no interrupt is wanted before the guest idles
013  66c7020100                    mov  word ptr [edx], 1
018  8b4504                submit: mov  eax, [ebp+c_next]          # as many requests as may be in flight, a batch at a time
01b  894518                        mov  [ebp+c_batch_at], eax
01e  8b7d10                fill:   mov  edi, [ebp+c_free]          # edi: a slot
021  85ff                          test edi, edi
023  0f841b010000                  jz   commit                     # queue depth is reached
029  8b7504                        mov  esi, [ebp+c_next]          # esi: the request
02c  3b7508                        cmp  esi, [ebp+c_end]
02f  0f830f010000                  jae  commit
035  837d0000                      cmp  dword ptr [ebp+c_stop], 0
039  0f8505010000                  jne  commit
03f  8b450c                        mov  eax, [ebp+c_low]           # all requests before this one are done
042  3b460c                        cmp  eax, [esi+r_wait]
045  0f82f9000000                  jb   commit                     # one that overlaps is in flight
04b  837e1000                      cmp  dword ptr [esi+r_stamp], 0
04f  7405                          je   begin
051  e8e1020000                    call fresh                      # a write that will be verified
056  0f31                  begin:  rdtsc
058  894620                        mov  [esi+t_start], eax
05b  895624                        mov  [esi+t_start+4], edx
05e  8b07                          mov  eax, [edi+s_next]          # take the slot
060  894510                        mov  [ebp+c_free], eax
063  897704                        mov  [edi+s_request], esi
066  8b06                          mov  eax, [esi+r_type]          # struct virtio_blk_req: type, reserved, sector
068  894720                        mov  [edi+s_header], eax
06b  c7472400000000                mov  dword ptr [edi+s_header+4], 0
072  8b4e04                        mov  ecx, [esi+r_sector]
075  894f28                        mov  [edi+s_header+8], ecx
078  c7472c00000000                mov  dword ptr [edi+s_header+12], 0
07f  c64730ff                      mov  byte ptr [edi+s_status], 0xff
083  8b5710                        mov  edx, [edi+s_descs]         # edx: its descriptors, in the table or in an indirect one
086  8d4f20                        lea  ecx, [edi+s_header]        # the header: addr, len, flags NEXT and next
089  890a                          mov  [edx], ecx
08b  c7420400000000                mov  dword ptr [edx+4], 0
092  c7420810000000                mov  dword ptr [edx+8], 16
099  8b4f0c                        mov  ecx, [edi+s_link]
09c  894a0c                        mov  [edx+12], ecx
09f  837e0800                      cmp  dword ptr [esi+r_bytes], 0
0a3  7426                          je   status                     # a flush has no data
0a5  83c210                        add  edx, 16
0a8  81c100000100                  add  ecx, 0x10000
0ae  83f800                        cmp  eax, 0
0b1  7503                          jne  data
0b3  83c902                        or   ecx, 2                     # WRITE: the device writes what is read from the disk
0b6  8b4714                data:   mov  eax, [edi+s_data]
0b9  8902                          mov  [edx], eax
0bb  c7420400000000                mov  dword ptr [edx+4], 0
0c2  8b4608                        mov  eax, [esi+r_bytes]
0c5  894208                        mov  [edx+8], eax
0c8  894a0c                        mov  [edx+12], ecx
0cb  83c210                status: add  edx, 16
0ce  8d4f30                        lea  ecx, [edi+s_status]
0d1  890a                          mov  [edx], ecx
0d3  c7420400000000                mov  dword ptr [edx+4], 0
0da  c7420801000000                mov  dword ptr [edx+8], 1
0e1  c7420c02000000                mov  dword ptr [edx+12], 2
0e8  8b4f08                        mov  ecx, [edi+s_head]
0eb  837d2800                      cmp  dword ptr [ebp+c_indirect], 0
0ef  7424                          je   ring
0f1  89c8                          mov  eax, ecx                   # one descriptor that says where the others are
0f3  c1e004                        shl  eax, 4
0f6  034534                        add  eax, [ebp+c_desc]
0f9  83c210                        add  edx, 16
0fc  2b5710                        sub  edx, [edi+s_descs]
0ff  895008                        mov  [eax+8], edx
102  8b5710                        mov  edx, [edi+s_descs]
105  8910                          mov  [eax], edx
107  c7400400000000                mov  dword ptr [eax+4], 0
10e  c7400c04000000                mov  dword ptr [eax+12], 4      # INDIRECT
115  894e4c                ring:   mov  [esi+r_head], ecx
118  8b5550                        mov  edx, [ebp+c_tokens]        # whose head this is
11b  893c8a                        mov  [edx+ecx*4], edi
11e  8b5538                        mov  edx, [ebp+c_avail]         # avail.ring[avail.idx % size] = head
121  8b4554                        mov  eax, [ebp+c_avail_idx]
124  ff4554                        inc  dword ptr [ebp+c_avail_idx]
127  234540                        and  eax, [ebp+c_mask]
12a  66894c4204                    mov  [edx+eax*2+4], cx
12f  ff451c                        inc  dword ptr [ebp+c_in_flight]
132  83c650                        add  esi, r_size
135  897504                        mov  [ebp+c_next], esi
138  2b7518                        sub  esi, [ebp+c_batch_at]
13b  3b7514                        cmp  esi, [ebp+c_batch]
13e  0f82dafeffff                  jb   fill
144  8b7518                commit: mov  esi, [ebp+c_batch_at]
147  3b7504                        cmp  esi, [ebp+c_next]
14a  7477                          je   reap                       # nothing was added
14c  0f31                          rdtsc
14e  894568                        mov  [ebp+c_published], eax
151  89556c                        mov  [ebp+c_published+4], edx
154  8b5538                        mov  edx, [ebp+c_avail]
157  8b4554                        mov  eax, [ebp+c_avail_idx]
15a  66894202                      mov  [edx+2], ax                # avail.idx: published
15e  f0834c24fc00                  lock or dword ptr [esp-4], 0    # a fence: the device sees avail.idx before its event word is read
164  ff4560                        inc  dword ptr [ebp+c_decisions]
167  8b4554                        mov  eax, [ebp+c_avail_idx]     # new
16a  89c1                          mov  ecx, eax
16c  2b4d5c                        sub  ecx, [ebp+c_kicked]        # new - old
16f  89455c                        mov  [ebp+c_kicked], eax
172  837d2400                      cmp  dword ptr [ebp+c_event_idx], 0
176  740f                          je   flags
178  8b5548                        mov  edx, [ebp+c_avail_event]   # vring_need_event(): new - event - 1 < new - old, modulo 2**16
17b  662b02                        sub  ax, [edx]
17e  6648                          dec  ax
180  6639c8                        cmp  ax, cx
183  731a                          jae  stamps
185  eb08                          jmp  bell
187  8b553c                flags:  mov  edx, [ebp+c_used]          # used.flags
18a  f60201                        test byte ptr [edx], 1          # NO_NOTIFY
18d  7510                          jnz  stamps
18f  8b554c                bell:   mov  edx, [ebp+c_bell]
192  8b7504                        mov  esi, [ebp+c_next]
195  ff46f8                        inc  dword ptr [esi-r_size+r_rang]
198  ff4310                        inc  dword ptr [ebx+0x10]       # the doorbell's stores, counted
19b  31c0                          xor  eax, eax
19d  8902                          mov  [edx], eax                 # QueueNotify: queue 0
19f  0f31                  stamps: rdtsc
1a1  8b7518                        mov  esi, [ebp+c_batch_at]
1a4  894630                stamp:  mov  [esi+t_issued], eax
1a7  895634                        mov  [esi+t_issued+4], edx
1aa  8b4d68                        mov  ecx, [ebp+c_published]
1ad  894e28                        mov  [esi+t_published], ecx
1b0  8b4d6c                        mov  ecx, [ebp+c_published+4]
1b3  894e2c                        mov  [esi+t_published+4], ecx
1b6  83c650                        add  esi, r_size
1b9  3b7504                        cmp  esi, [ebp+c_next]
1bc  72e6                          jb   stamp
1be  e955feffff                    jmp  submit
1c3  8b553c                reap:   mov  edx, [ebp+c_used]
1c6  8b4d58                        mov  ecx, [ebp+c_last_used]
1c9  663b4a02                      cmp  cx, [edx+2]                # used.idx
1cd  0f84a4000000                  je   empty
1d3  89c8                  drain:  mov  eax, ecx
1d5  234540                        and  eax, [ebp+c_mask]
1d8  8b44c204                      mov  eax, [edx+eax*8+4]         # used.ring[…].id
1dc  3b4540                        cmp  eax, [ebp+c_mask]
1df  0f8748010000                  ja   broken
1e5  8b5550                        mov  edx, [ebp+c_tokens]
1e8  8b3c82                        mov  edi, [edx+eax*4]
1eb  85ff                          test edi, edi
1ed  0f843a010000                  jz   broken                     # not the head of a request in flight
1f3  c7048200000000                mov  dword ptr [edx+eax*4], 0
1fa  ff4558                        inc  dword ptr [ebp+c_last_used]
1fd  8b7704                        mov  esi, [edi+s_request]
200  0f31                          rdtsc
202  894640                        mov  [esi+t_taken], eax
205  895644                        mov  [esi+t_taken+4], edx
208  8b4570                        mov  eax, [ebp+c_irq]           # the interrupt that it was taken after
20b  894638                        mov  [esi+t_irq], eax
20e  8b4574                        mov  eax, [ebp+c_irq+4]
211  89463c                        mov  [esi+t_irq+4], eax
214  0fb64730                      movzx eax, byte ptr [edi+s_status]
218  40                            inc  eax
219  894614                        mov  [esi+r_done], eax          # 1 + status
21c  48                            dec  eax
21d  7512                          jnz  failed
21f  837d7800                      cmp  dword ptr [ebp+c_shadow], 0
223  7419                          je   free
225  833e00                        cmp  dword ptr [esi+r_type], 0
228  7514                          jne  free
22a  e887010000                    call check
22f  eb0d                          jmp  free
231  837e1000              failed: cmp  dword ptr [esi+r_stamp], 0
235  7407                          je   free
237  31c0                          xor  eax, eax                   # nobody knows what these sectors hold now
239  e840010000                    call note
23e  8b4510                free:   mov  eax, [ebp+c_free]
241  8907                          mov  [edi+s_next], eax
243  897d10                        mov  [ebp+c_free], edi
246  ff4d1c                        dec  dword ptr [ebp+c_in_flight]
249  ff4520                        inc  dword ptr [ebp+c_completed]
24c  8b750c                        mov  esi, [ebp+c_low]
24f  3b7504                low:    cmp  esi, [ebp+c_next]
252  730b                          jae  lowest
254  837e1400                      cmp  dword ptr [esi+r_done], 0
258  7405                          je   lowest
25a  83c650                        add  esi, r_size
25d  ebf0                          jmp  low
25f  89750c                lowest: mov  [ebp+c_low], esi
262  8b553c                        mov  edx, [ebp+c_used]
265  8b4d58                        mov  ecx, [ebp+c_last_used]
268  663b4a02                      cmp  cx, [edx+2]
26c  0f8561ffffff                  jne  drain
272  e9a1fdffff                    jmp  submit
277  837d1c00              empty:  cmp  dword ptr [ebp+c_in_flight], 0
27b  0f84a8000000                  je   done
281  f390                          pause
283  837d2c00                      cmp  dword ptr [ebp+c_poll], 0
287  0f8536ffffff                  jne  reap                       # a polled queue: no interrupt is wanted
28d  837d2400                      cmp  dword ptr [ebp+c_event_idx], 0
291  7408                          je   ask
293  8b4544                        mov  eax, [ebp+c_used_event]    # used_event: interrupt me for the next one
296  668908                        mov  [eax], cx
299  eb08                          jmp  look
29b  8b4538                ask:    mov  eax, [ebp+c_avail]         # avail.flags
29e  66c7000000                    mov  word ptr [eax], 0
2a3  f0834c24fc00          look:   lock or dword ptr [esp-4], 0    # a fence, and a second look
2a9  663b4a02                      cmp  cx, [edx+2]
2ad  7563                          jne  quiet
2af  837d3000                      cmp  dword ptr [ebp+c_spin], 0
2b3  7508                          jne  wait
2b5  fb                            sti
2b6  f4                    idle:   hlt                             # idle in the kernel until an interrupt comes
2b7  fa                            cli
2b8  e906ffffff                    jmp  reap
2bd  fb                    wait:   sti                             # idle in guest mode
2be  f390                  spin:   pause
2c0  ebfc                          jmp  spin
2c2  0f31                  irq:    rdtsc                           # registers are free: interrupts are on in hlt and spin alone
2c4  894570                        mov  [ebp+c_irq], eax
2c7  895574                        mov  [ebp+c_irq+4], edx
2ca  be000010e0                    mov  esi, 0xe0100000            # the registers of virtio-mmio
2cf  8b4660                        mov  eax, [esi+0x60]            # InterruptStatus: an exit
2d2  85c0                          test eax, eax
2d4  7427                          jz   none
2d6  894664                        mov  [esi+0x64], eax            # InterruptACK: another; the device lowers the line
2d9  83e002                        and  eax, 2                     # a change of the configuration is for later
2dc  094318                        or   [ebx+0x18], eax
2df  bf004000e0                    mov  edi, 0xe0004000            # the device's counts: causes raised (VRING, CONFIG)
2e4  8b07                          mov  eax, [edi]
2e6  034704                        add  eax, [edi+4]
2e9  89c1                          mov  ecx, eax
2eb  2b4b3c                        sub  ecx, [ebx+0x3c]            # raised since the interrupt before this one
2ee  89433c                        mov  [ebx+0x3c], eax
2f1  014b2c                        add  [ebx+0x2c], ecx            # seen
2f4  49                            dec  ecx
2f5  014b30                        add  [ebx+0x30], ecx            # coalesced
2f8  ff4328                        inc  dword ptr [ebx+0x28]       # taken
2fb  eb03                          jmp  eoi
2fd  ff4334                none:   inc  dword ptr [ebx+0x34]       # spurious
300  ba0000e0fe            eoi:    mov  edx, 0xfee00000            # the local APIC
305  c782b000000000000000          mov  dword ptr [edx+0xb0], 0
30f  83c40c                        add  esp, 12                    # drop the frame: eip, cs, eflags
312  837d2400              quiet:  cmp  dword ptr [ebp+c_event_idx], 0
316  0f85a7feffff                  jne  reap
31c  8b4538                        mov  eax, [ebp+c_avail]         # NO_INTERRUPT while the used ring is drained
31f  66c7000100                    mov  word ptr [eax], 1
324  e99afeffff                    jmp  reap
329  e610                  done:   out  0x10, al                   # every request is done: back to whoever asked
32b  ebfc                          jmp  done
32d  898588000000          broken: mov  [ebp+c_broken], eax        # the device names a head that is not in flight
333  e613                          out  0x13, al
335  ebf6                          jmp  broken
337  8b4610                fresh:  mov  eax, [esi+r_stamp]         # the contents of write number r_stamp; it owns its sectors now
33a  e83f000000                    call note
33f  56                            push esi
340  57                            push edi
341  8b4604                        mov  eax, [esi+r_sector]
344  8b5610                        mov  edx, [esi+r_stamp]
347  8b7f14                        mov  edi, [edi+s_data]
34a  e846000000                    call place
34f  8b4e08                        mov  ecx, [esi+r_bytes]
352  89d6                          mov  esi, edx
354  c1e902                        shr  ecx, 2
357  f3a5                          rep  movsd
359  5f                            pop  edi
35a  5e                            pop  esi
35b  8b4e04                        mov  ecx, [esi+r_sector]
35e  8b5714                        mov  edx, [edi+s_data]
361  8b4608                        mov  eax, [esi+r_bytes]
364  01d0                          add  eax, edx
366  50                            push eax
367  8b4610                head:   mov  eax, [esi+r_stamp]
36a  894204                        mov  [edx+4], eax
36d  894a08                        mov  [edx+8], ecx
370  41                            inc  ecx
371  81c200020000                  add  edx, 512
377  3b1424                        cmp  edx, [esp]
37a  72eb                          jb   head
37c  58                            pop  eax
37d  c3                            ret
37e  57                    note:   push edi                        # every sector of the request belongs to write eax
37f  8b7e04                        mov  edi, [esi+r_sector]
382  2b7d7c                        sub  edi, [ebp+c_first]
385  c1e702                        shl  edi, 2
388  037d78                        add  edi, [ebp+c_shadow]
38b  8b4e08                        mov  ecx, [esi+r_bytes]
38e  c1e909                        shr  ecx, 9
391  f3ab                          rep  stosd
393  5f                            pop  edi
394  c3                            ret
395  50                    place:  push eax                        # edx: where the pool has sector eax of write edx
396  b8b179379e                    mov  eax, 0x9e3779b1
39b  f7e2                          mul  edx
39d  31d2                          xor  edx, edx
39f  030424                        add  eax, [esp]
3a2  83d200                        adc  edx, 0
3a5  f7b584000000                  div  dword ptr [ebp+c_sectors]
3ab  c1e209                        shl  edx, 9
3ae  039580000000                  add  edx, [ebp+c_pool]
3b4  58                            pop  eax
3b5  c3                            ret
3b6  56                    check:  push esi                        # every sector of a read against the write that it belongs to
3b7  57                            push edi
3b8  8b7f14                        mov  edi, [edi+s_data]
3bb  8b4604                        mov  eax, [esi+r_sector]
3be  8b4e08                        mov  ecx, [esi+r_bytes]
3c1  c1e909                        shr  ecx, 9
3c4  51                    sector: push ecx
3c5  56                            push esi
3c6  57                            push edi
3c7  89c1                          mov  ecx, eax
3c9  2b4d7c                        sub  ecx, [ebp+c_first]
3cc  c1e102                        shl  ecx, 2
3cf  034d78                        add  ecx, [ebp+c_shadow]
3d2  8b11                          mov  edx, [ecx]
3d4  85d2                          test edx, edx
3d6  7434                          jz   right                      # not written in this run
3d8  3b5704                        cmp  edx, [edi+4]               # the stamp
3db  7525                          jne  wrong
3dd  3b4708                        cmp  eax, [edi+8]               # the sector
3e0  7520                          jne  wrong
3e2  837f0c00                      cmp  dword ptr [edi+12], 0
3e6  751a                          jne  wrong
3e8  e8a8ffffff                    call place
3ed  8b0a                          mov  ecx, [edx]                 # the magic
3ef  3b0f                          cmp  ecx, [edi]
3f1  750f                          jne  wrong
3f3  8d7210                        lea  esi, [edx+16]
3f6  83c710                        add  edi, 16
3f9  b97c000000                    mov  ecx, 124
3fe  f3a7                          repe cmpsd
400  740a                          je   right
402  5f                    wrong:  pop  edi
403  5e                            pop  esi
404  ff4618                        inc  dword ptr [esi+r_wrong]
407  89461c                        mov  [esi+r_where], eax         # the last of them
40a  eb02                          jmp  onward
40c  5f                    right:  pop  edi
40d  5e                            pop  esi
40e  59                    onward: pop  ecx
40f  40                            inc  eax
410  81c700020000                  add  edi, 512
416  49                            dec  ecx
417  75ab                          jnz  sector
419  5f                            pop  edi
41a  5e                            pop  esi
41b  c3                            ret
"""


def _symbols() -> str:
    """The names that the source uses."""
    places = {f"c_{word.name.lower()}": 4 * word for word in Ctl}
    for prefix, kind in (("r", REQUEST), ("s", SLOT)):
        for name in kind.names or ():
            places[f"{'t' if kind is REQUEST and name in TIMES else prefix}_{name}"] = kind.fields[name][1]  # type: ignore[index]
    places["r_size"] = REQUEST.itemsize
    return "".join(f".set {name}, {at}\n" for name, at in places.items())


def source() -> str:
    """The assembler's input, in Intel syntax: names, then the listing without offsets and bytes."""
    return _symbols() + "\n".join(line[SOURCE_COLUMN:] for line in LISTING.splitlines())


SOURCE_COLUMN = 27
CODE = b"".join(bytes.fromhex(line.split()[1]) for line in LISTING.splitlines())


def offset_of(label: str) -> int:
    """Where ``label`` lies in ``CODE``."""
    return next(int(line[:3], 16) for line in LISTING.splitlines() if line[SOURCE_COLUMN:].startswith(f"{label}:"))


def image() -> bytes:
    """What this payload's memory holds at first: code, and an interrupt table with a gate for the line."""
    memory = bytearray(IMAGE_BYTES)
    memory[: len(CODE)] = CODE
    handler = BASE + offset_of("irq")
    gate = TABLE_AT + 8 * LINE_VECTOR
    struct.pack_into("<HHBBH", memory, gate, handler & 0xFFFF, CODE_SELECTOR, 0, 0x8E, handler >> 16)
    return bytes(memory)


def start(vcpu: Vcpu) -> None:
    """Let ``vcpu`` stand at the first instruction."""
    vcpu.start_at(BASE, STACK_TOP, gdt=(GDT_GPA, GDT_BYTES), idt=(BASE + TABLE_AT, 256 * 8))
