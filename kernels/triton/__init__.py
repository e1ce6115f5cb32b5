"""Triton kernels, one file per op, imported as `gemma4_fast.triton`.

Nothing is imported here: the op table imports a kernel's file when it first needs it, so that a machine without Triton
never notices. A kernel knows tensors and strides, nothing of the model.
"""
