"""Publishes completions without end: every slot as its client will look for it next. In a process of its own, so that no lock slows it.

Arguments: the segment's file, offsets of the completion queue and of the word that tells how many were taken, slots. Ends with its stdin.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading

import numpy as np

SLOT_WORDS = 128

path, queue_offset, taken_offset, depth = sys.argv[1], *map(int, sys.argv[2:])
file = os.open(path, os.O_RDWR)
words = np.frombuffer(mmap.mmap(file, 0), dtype=np.uint64)
sequences = words[queue_offset // 8 : queue_offset // 8 + depth * SLOT_WORDS : SLOT_WORDS]
taken = words[taken_offset // 8 : taken_offset // 8 + 1]
ahead = np.arange(1, depth + 1, dtype=np.uint64)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
print("ready", flush=True)
while not ended.is_set():
    for _ in range(1000):
        first = int(taken[0])
        sequences[:] = np.roll(ahead + np.uint64(first), first % depth)
