"""This op finds the k most likely tokens of rows of the residual stream (logit lens), without the logits in memory.

    h[t]     = norm(x[t])                   rounded to the dtype of x, as the decoder hands it to its unembedding
    l[t, v]  = h[t]·unembedding[v]          summed in float32 and not rounded
    l        = cap · tanh(l / cap)          where soft_cap > 0
    log_total[t] = log Σ_v exp l[t, v]
    ids[t]   = the k tokens of largest l[t], the lowest id first among equals;  values = l[t, ids] - log_total[t]

norm is x / sqrt(mean x² + eps) · weight (RMS), or (x - mean) / sqrt(var + eps) · weight + bias where there is a bias
(layer norm), or nothing where there is no weight: the rows come normalised. x [T, d] and unembedding [V, d] share a
dtype (float32, float16, bfloat16). The decoder rounds its logits to that dtype before it widens them; this op does not,
so bfloat16 logits that the decoder would call equal are told apart here. Source: nostalgebraist, "interpreting GPT: the
logit lens", 2020.

A row with NaN or +inf among its logits, or only -inf, has no distribution: its ids are NOT_FINITE, the rest NaN.

In pass 1 an instance has a tile of rows and a tile of tokens. It holds the tile of logits in registers and leaves their
maximum, sum of exponentials and the k largest with their ids, found by taking the maximum k times. Sorting the tile was
considered and rejected: rows of a tile lie within a quad of lanes after tl.dot, so a maximum is two shuffles, and k is
mostly 1 to 16. The candidates take 8 k bytes for every 128 logits. In pass 2 an instance has a row and merges the tiles
in the order of ids: each tile's candidates are already in order, so it holds one head for each tile and replaces the
one it takes.

The op is bound by V·d elements of unembedding (1.05 GB for Llama-3-8B in bf16) up to some 150 rows, then by 2·T·V·d
FLOPs. Row tiles run fastest, so those of one tile of tokens share its rows of the unembedding in L2.

The server does not call it yet: its lens on CUDA runs torch operators until a GPU is at hand to compare both.
"""

from patchclamp_kernels.logit_lens_topk.cases import compile_cases, tuning_cases
from patchclamp_kernels.logit_lens_topk.op import logit_lens_topk
from patchclamp_kernels.logit_lens_topk.reference import (
    NOT_FINITE,
    LensTopK,
    logit_lens_topk_reference,
    normalised_reference,
)

__all__ = [
    "NOT_FINITE",
    "LensTopK",
    "compile_cases",
    "logit_lens_topk",
    "logit_lens_topk_reference",
    "normalised_reference",
    "tuning_cases",
]
