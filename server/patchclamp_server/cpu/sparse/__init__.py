"""This package has MLPs and projections that read only the weights of active neurons and channels, on a CPU; low-bit
copies of matrices to choose them by (low_bits.py, which says what else was tried for those); and the dense product of
one row.

These ways were tried, and the best one kept (2 shared cores, batch 1; the first table is one float32 or bfloat16 MLP of
d 4096, d_ff 14336 at keep .5, least milliseconds of a run; the second the 30 MLPs of SmolLM2-135M in 4-bit codes, from
memory):

    gate and up    float32   bfloat16     down                               float32   bfloat16
    dense, F.linear   23.8       21.8     dense, F.linear                       10.3       10.8
    compact, F.linear 11.3       10.7     compact, F.linear                      5.5        5.2
    numba's vectors    9.6       10.4     numba's vectors                        6.6       11.9
                                          embedding_bag in 4 bags of a thread    6.0        4.9
    ours: where compact F.linear took 21.0 for all three slices float32 (23.2 bfloat16) on a busier machine,
    gathered rows took 14.7 + 7.1 (7.3 + 3.2): as fast without a compact copy, so that there is none of floats

    codes, keep .5: up (dense 1.6 ms)        numba's vectors 13; ours 4.5, with lines asked for in advance into the
                                             inner cache 2.1, into the outer caches 1.3 (hot 0.7)
    codes, keep .5: down (dense 1.6 ms)      gathered 2.4, asking for rows 1.6, for scales too 1.4; compact 1.5, with
                                             scales asked for 1.1 (hot 0.7)

Asking 4, 8, 16 or 32 rows ahead, and memory in huge pages, made no difference. Code that needs a C++ compiler at run
time (inductor) is not used: a server need not have one.
"""
