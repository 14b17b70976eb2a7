"""Program: a cable that delays. `slow_link.py NEAR FAR MS` makes two TAP devices; each frame crosses after MS milliseconds.

In place of tc's netem, which many kernels lack. A TAP device hands out frames with their checksums filled in and cut to the
link's size, so that they can be put on the other side as they are. The devices end with this process.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
MOST_FRAMES = 20_000  # on their way; beyond them a real cable's buffers would drop, too


def open_tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def carry(ends: tuple[int, int], delay_s: float) -> None:
    """For ever: what comes in at one end leaves at the other, `delay_s` later."""
    under_way: deque[tuple[float, int, bytes]] = deque()  # (time to leave, where to, frame); the delay is the same for all
    while True:
        wait = None if not under_way else max(0.0, under_way[0][0] - time.monotonic())
        ready, _, _ = select.select(ends, [], [], wait)
        for source in ready:
            frame = os.read(source, 65536)
            if len(under_way) < MOST_FRAMES:
                under_way.append((time.monotonic() + delay_s, ends[1 - ends.index(source)], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, target, frame = under_way.popleft()
            try:
                os.write(target, frame)
            except OSError:  # the device is down: the frame is lost, as on a cut cable
                continue


if __name__ == "__main__":
    taps = open_tap(sys.argv[1]), open_tap(sys.argv[2])
    print("ready", flush=True)
    carry(taps, float(sys.argv[3]) / 1000)
