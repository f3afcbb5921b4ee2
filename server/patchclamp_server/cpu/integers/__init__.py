"""Products of stored rows with activations that are rounded to 8 bits, as llama.cpp computes them.

    x ≈ s q,  s = max|x| / 127 of each 32 inputs,  q = round(x / s)
    y = Σ_g d_g (s_g Σ_k c_k q_k) + m_g (s_g Σ_k q_k)    for weights w = d c + m of a group g

The sums of products of codes are exact, in int32; those of groups are float32, in one order. So the bits of a row
depend on nothing else, whichever instructions the processor has for products of bytes (`dots`).

`rounding` makes q and s; `columns`, `blocks` and `k_blocks` read the codes of 16 rows of weights side by side, one row
a lane; `table` says which format is read how; `tiles` are the loops over groups.
"""
