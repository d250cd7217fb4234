"""Work that goes wrong, for test_on_gpu.py; a module of its own, which a process imports in no time."""

from __future__ import annotations

import os
import signal
import time

from tests.tensorrt.jobs import Job


def trouble(job: Job) -> list[int]:
    """Case 3 raises, 5 never ends, 6 kills its process."""
    if 3 in job:
        raise ValueError("three")
    if 5 in job:
        time.sleep(60)
    if 6 in job:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [number * 10 for number in job]
