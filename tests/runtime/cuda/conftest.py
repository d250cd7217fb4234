"""What Triton's interpreter is told for the kernels."""

from tests.kernels.conftest import _bf16_products, _rounding
from tests.runtime.cuda.emulated import gpu
from tests.runtime.cuda.fake import trt_gpu
from tests.runtime.cuda.ranks import gpus

__all__ = ["_bf16_products", "_rounding", "gpu", "gpus", "trt_gpu"]
