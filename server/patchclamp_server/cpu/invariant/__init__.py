"""This package computes a row of a batch so that its bits depend on nothing but the row, on a CPU in float32.

`tiles` has the vectors, whose sums have one order; `rows` does everything that a decoder does to a row besides products
with weights (cpu/products.py), and `operators` offers that to torch.
"""
