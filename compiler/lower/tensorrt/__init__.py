"""The GPU backend: TensorRT, through its Python API, operation by operation; attention is a kernel between engines.

Importing this loads neither TensorRT nor PyTorch; see `cut` for the pieces of a model and `network` for the emission.
"""
