"""GPU kernels in Triton for what an engine can't do: rotary and append, paged attention, tokens, products, experts.

compiler/ir/ops/attention.py defines what they compute; tests run them in Triton's interpreter against it. `library`
says which kernels a plan needs and compiles them ahead of time, also where no GPU is.
"""
