"""Runs GPU plans (docs/gpu-plan.md) with TensorRT, the CUDA driver and numpy.

`arena`, `batch` and `budget` are plain functions of numbers, tested without a GPU; `driver`, `engines`, `kernels`,
`weights` and `executable` call CUDA and TensorRT, which are imported when a GPU bundle is loaded.
"""
