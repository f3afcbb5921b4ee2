"""The code that LLVM gets for each format of stored weights: bytes become vectors of 16 float32.

`floats` has rows of numbers, `blocks` the blocks of 32 codes and `k_blocks` those of 256; `table` says which is whose.
Values are those of gguf.dequantize, bit by bit. A code times its scale has at most 24 bits and so is exact in float32:
a fused multiply-add of code, scale and low rounds once, as gguf's product and sum do.
"""
