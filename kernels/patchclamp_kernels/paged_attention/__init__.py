"""This op is attention of a ragged batch of prefill and decode rows over a paged KV cache, with a read-out of weights.

    s_j = cap(q_h · k_j · scale)    over keys j ≤ position, j > position - window, and for streaming heads j < sink or
                                    j > position - recent
    p = softmax(s),   z_h = head_scale_h Σ_j p_j v_j,   cap(s) = c tanh(s / c) where there is a soft cap
    argmax_h = the first j of largest p_j,   probability_h = p_argmax,   marked_mass_h = Σ_{lo ≤ j < hi} p_j

q [T, H, D]; the caches are [n_blocks, block_size, KV, D]; query head h reads KV head h // (H / KV). The softmax is
online (FlashAttention, Dao et al. 2022) and split over the context at decode (Flash-Decoding, Dao et al. 2023), over
block tables (PagedAttention, Kwon et al. 2023). It takes float32, float16 and bfloat16; everything accumulates in
float32.

Its bounds are these. Decode reads each key and value of the context once: 2 · context · KV · D elements for a sequence
over the memory bandwidth; products are 2 · H / KV operations for an element, far below what an SM can do in that time.
Prefill of n rows is bound by 4 · n² / 2 · H · D operations.

The read-out costs little because an online softmax already knows the largest score m of every row: the largest weight
is exp(m - m) / l = 1 / l, and only the place of m has to be remembered. Decode remembers for each lane of its tile the
tile in which the lane's maximum stood, a comparison and two selects of a value in registers, and finds the place
once after the loop; prefill compares a tile against its maximum within the threads of a row. It reads no more bytes.

Splits are at least SPLIT keys long, and longer only where a context has more than SPLITS of them: how a row is split
follows from its own length and the configuration, so that its bits do not depend on the other rows of the batch as long
as the batch is in the same bucket of sizes. Partial results go to scratch and are added in order of the splits.

Masked keys are not loaded, so the cache may hold anything, NaN included, where no token of the sequence stands.
"""

from patchclamp_kernels.paged_attention.batch import Attended, RaggedBatch, Streaming
from patchclamp_kernels.paged_attention.cases import compile_cases, tuning_cases
from patchclamp_kernels.paged_attention.op import paged_attention, scratch_floats
from patchclamp_kernels.paged_attention.reference import paged_attention_reference

__all__ = [
    "Attended",
    "RaggedBatch",
    "Streaming",
    "compile_cases",
    "paged_attention",
    "paged_attention_reference",
    "scratch_floats",
    "tuning_cases",
]
