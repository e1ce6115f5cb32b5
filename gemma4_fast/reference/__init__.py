"""The truth every backend is held to: plain PyTorch, any dtype, no cache tricks, nothing to tune.

`reference.ops` has one function per op of the table, `reference.model` a whole model built from them.
"""
