"""What every test runs under: no network, one thread for each parallel worker, repeatable examples in CI."""

from __future__ import annotations

import os

# before torch, openvino or transformers are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# kernels run in Triton's interpreter; its own library is made for it when transformers first imports it
os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# no deadline: a shared machine has slow seconds. In CI the same examples every time: a failure there is of this change.
settings.register_profile("specrt", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("specrt")
