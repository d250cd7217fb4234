"""Launches that overlap (programmatic dependent launch): a kernel starts while the one before still runs.

From sm_90 on a launch may begin as soon as every block of the launch before has said so, or ended. Then every block
waits, on every path and before it writes; earlier it reads only what no kernel writes: the arrays of a batch but its
tokens, copied to the device before the first launch of the step began. The wait ends when the launch before has ended
with all that it wrote. That one cannot end before its own wait does, so by induction all earlier launches have ended
too: whatever is read is there, and nobody still reads what is overwritten. A kernel that is not compiled to wait is
launched without the attribute (runtime/cuda/driver.py), and so begins behind the end of the launch before.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRST = 90  # sm_90 is the first architecture that has it; below, and in Triton's interpreter, `overlap` is False


@triton.jit
def wait(overlap: tl.constexpr):
    """Wait for the end of all launches before, then let the next one begin.

    In the other order several launches wait at once, which was slower (decision 48).
    """
    if overlap:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
