"""The same contention as a SimPy model: what one would write without vblklab.  No ring, no bytes, no data.

Each I/O holds vCPU, iothread, host CPU and drive on the way down and host CPU, iothread and vCPU on the way up (seven acquire
and release pairs) and passes fourteen timeouts, one a step.
"""

from __future__ import annotations

import time

import simpy

_DOWN_AND_UP_NS = (
    ("vcpu", 137, 501),  # D1 D2 … U7: two timeouts while each resource is held
    ("vcpu", 364, 1221),
    ("iothread", 1187, 320),
    ("host", 365, 182),
    ("drive", 0, 5000),
    ("host", 1280, 417),
    ("iothread", 408, 954),
)


def simpy_ios_per_second(iodepth: int, ios: int) -> float:
    """Run the model and return simulated I/Os per second of CPU time."""
    env = simpy.Environment()
    resources = {
        "vcpu": simpy.Resource(env, 1),
        "iothread": simpy.Resource(env, 1),
        "host": simpy.Resource(env, 1),
        "drive": simpy.Resource(env, 3),
    }
    left = [ios]

    def worker():  # type: ignore[no-untyped-def]
        while left[0] > 0:
            left[0] -= 1
            for name, first_ns, second_ns in _DOWN_AND_UP_NS:
                with resources[name].request() as request:
                    yield request
                    yield env.timeout(first_ns)
                    yield env.timeout(second_ns)

    for _ in range(iodepth):
        env.process(worker())
    start = time.process_time()
    env.run()
    return ios / (time.process_time() - start)
