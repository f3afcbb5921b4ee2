"""Computing a row of a batch so that its bits depend on nothing but the row, on a CPU in float32.

`tiles` has the vectors, whose sums have one order; `products` multiplies by weights, `rows` does what a decoder does to
a row besides, and `operators` gives that to torch.
"""
