"""Bugs that the tests must catch, planted by mutate.py: what to write in the place of what, and which tests go red."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`file` is below kernels/patchclamp_kernels, `tests` are node ids below tests/kernels; `old` occurs once."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


ATTENTION = [
    Mutation(
        "attention-last-block",
        "paged_attention/decode.py",
        "for tile in range(begin, tl.minimum(begin + share, n_tiles)):",
        "for tile in range(begin, tl.minimum(begin + share, n_tiles - 1)):",
        "the last tile of keys is left out",
        ("test_paged_attention.py::test_a_context_may_end_anywhere_in_blocks_tiles_and_splits",),
    ),
    Mutation(
        "attention-mask",
        "paged_attention/decode.py",
        'scores = tl.where(visible, scores, float("-inf"))',
        "scores = tl.where(visible, scores, 0.0)",
        "keys beyond the context have a weight",
        ("test_paged_attention.py::test_a_context_may_end_anywhere_in_blocks_tiles_and_splits",),
    ),
    Mutation(
        "attention-stale-accumulator",
        "paged_attention/decode.py",
        "acc = product(weights.to(v.dtype), v, acc * decay[:, None])",
        "acc = product(weights.to(v.dtype), v, acc)",
        "values seen before a new maximum keep their old weight",
        ("test_paged_attention.py::test_a_context_may_end_anywhere_in_blocks_tiles_and_splits",),
    ),
    Mutation(
        "attention-gqa-map",
        "paged_attention/decode.py",
        "heads = kv_head * GROUP + members",
        "heads = kv_head + members * N_KV",
        "query heads are dealt out to the key heads in turns",
        ("test_paged_attention.py::test_any_number_of_query_heads_a_key_head",),
    ),
    Mutation(
        "attention-prefill-gqa-map",
        "paged_attention/prefill.py",
        "head // (N_HEADS // N_KV)",
        "head % N_KV",
        "the same in a prefill chunk",
        ("test_paged_attention.py::test_any_number_of_query_heads_a_key_head",),
    ),
    Mutation(
        "attention-prefill-diagonal",
        "paged_attention/prefill.py",
        "plain = tl.minimum((first_position + 1) // TILE, n_tiles)",
        "plain = tl.minimum(first_position // TILE + 1, n_tiles)",
        "the first tile on the diagonal is taken for one that every row sees",
        ("test_paged_attention.py::test_a_chunk_may_begin_and_end_anywhere",),
    ),
    Mutation(
        "attention-window",
        "paged_attention/decode.py",
        "seen &= position - tokens < window",
        "seen &= position - tokens <= window",
        "the window is one key too long",
        ("test_paged_attention.py::test_a_window_hides_older_keys",),
    ),
    Mutation(
        "attention-combine",
        "paged_attention/decode.py",
        "acc += part * tl.exp2(maximum - top)",
        "acc = part * tl.exp2(maximum - top)",
        "only the last splits of a long context count",
        ("test_paged_attention.py::test_a_context_may_have_more_splits_than_are_combined_at_a_time",),
    ),
    Mutation(
        "attention-argmax-of-equals",
        "paged_attention/prefill.py",
        "key = tl.where(tile_top > top, tile_key, key)",
        "key = tl.where(tile_top >= top, tile_key, key)",
        "of equal weights in two tiles the later is named",
        ("test_paged_attention.py::test_all_keys_equal_name_the_first_visible_one",),
    ),
]

ROPE = [
    Mutation(
        "rope-partner",
        "rope_kv_write.py",
        "columns + ROTARY // 2, columns - ROTARY // 2)",
        "columns + ROTARY // 2, columns - ROTARY // 2 + 1)",
        "the second half turns with its neighbour's partner",
        ("test_rope_kv_write.py::test_rotates_and_writes_what_the_reference_does",),
    ),
    Mutation(
        "rope-padding-rows",
        "rope_kv_write.py",
        "is_key = (slot >= 0) & (heads >= N_HEADS)",
        "is_key = (heads >= N_HEADS)",
        "rows that only pad the batch write keys in front of the cache",
        ("test_rope_kv_write.py::test_padding_rows_leave_the_cache_alone",),
    ),
    Mutation(
        "rope-last-head",
        "rope_kv_write.py",
        "inside = (heads < N_HEADS + 2 * N_KV)",
        "inside = (heads <= N_HEADS + 2 * N_KV)",
        "one head too many is read and written",
        ("test_rope_kv_write.py::test_any_number_of_heads",),
    ),
]

RESIDUAL = [
    Mutation(
        "residual-scope",
        "residual_edits/entries.py",
        "runs = in_scope\n",
        "runs = True\n",
        "edits run at rows that are out of their scope",
        ("test_residual_edits.py::test_items_of_every_word_of_the_mask_are_told_apart",),
    ),
    Mutation(
        "residual-stale-norm",
        "residual_edits/entries.py",
        "change = moved / tl.maximum(norm, TINY)",
        "change = moved / tl.maximum(_length(h), TINY)",
        "receipts are relative to the row after the edit",
        ("test_residual_edits.py::test_an_edit_is_relative_to_the_row_it_was_given",),
    ),
    Mutation(
        "residual-last-neurons",
        "residual_edits/entries.py",
        "square += tl.where(listed, (edited - a) * (edited - a), 0.0)\n        done += UNITS",
        "square += tl.where(listed, (edited - a) * (edited - a), 0.0)\n        done += count",
        "neurons after the first tile of a list are not edited",
        ("test_residual_edits.py::test_a_list_of_neurons_may_be_longer_than_a_tile",),
    ),
    Mutation(
        "residual-subspace-last-rank",
        "residual_edits/entries.py",
        "count = tl.where(at >= 0, rank, 0)",
        "count = tl.where(at >= 0, rank - 1, 0)",
        "a patch in a subspace leaves out the last direction",
        ("test_residual_edits.py::test_a_row_patched_in_a_subspace_keeps_what_is_outside",),
    ),
    Mutation(
        "residual-layer-norm-mask",
        "residual_edits/kernel.py",
        "h = tl.where(inside, h - tl.sum(h, axis=0) / D, 0.0)",
        "h = h - tl.sum(h, axis=0) / D",
        "lanes beyond the width count in the variance",
        ("test_residual_edits.py::test_a_row_s_mean_does_not_include_lanes_beyond_its_width",),
    ),
    Mutation(
        "residual-latch",
        "residual_edits/entries.py",
        "is_open = since <= ",
        "is_open = since < ",
        "a latch opens one token late",
        ("test_residual_edits.py::test_a_latch_keeps_the_first_position_and_is_open_from_there_on",),
    ),
]

RECEIPTS = [
    Mutation(
        "receipts-stale-accumulator",
        "receipts.py",
        "total += tl.sum(part.to(tl.float64), axis=0)",
        "total = tl.sum(part.to(tl.float64), axis=0)",
        "only the last tile of rows counts",
        ("test_receipts.py::test_a_span_may_have_any_number_of_rows",),
    ),
    Mutation(
        "receipts-mask",
        "receipts.py",
        "mask=(done + row < n)[:, None] & wanted[None, :]",
        "mask=wanted[None, :]",
        "rows of the next span are added too",
        ("test_receipts.py::test_a_span_may_have_any_number_of_rows",),
    ),
    Mutation(
        "receipts-precision",
        "receipts.py",
        "total += tl.sum(part.to(tl.float64), axis=0)",
        "total += tl.sum(part, axis=0)",
        "sums are float32",
        ("test_receipts.py::test_sums_lose_no_small_changes_to_float32",),
    ),
]

ACTIVATION = [
    Mutation(
        "activation-last-tile",
        "gated_activation/activation.py",
        "inside = columns < d_ff",
        "inside = columns <= d_ff",
        "a row writes the first neuron of the next one",
        ("test_gated_activation.py::test_any_width_of_the_last_tile_is_made_whole",),
    ),
    Mutation(
        "activation-neuron-list",
        "gated_activation/activation.py",
        "low = tl.maximum(tl.sum((unit < start).to(tl.int32)) - 1, 0) * stride",
        "low = tl.sum((unit < start).to(tl.int32)) * stride",
        "neurons of a tile between two samples of a long list are passed over",
        ("test_gated_activation.py::test_long_lists_of_neurons_are_found_in_every_tile",),
    ),
    Mutation(
        "activation-scope",
        "gated_activation/activation.py",
        "return in_scope & tl.where(",
        "return tl.where(",
        "edits run at rows that are out of their scope",
        ("test_gated_activation.py::test_rows_out_of_the_scope_of_an_item_are_left_alone",),
    ),
    Mutation(
        "activation-stale-norm",
        "gated_activation/activation.py",
        "if e > first:",
        "if e < first:",
        "every entry is relative to the row before the first",
        ("test_gated_activation.py::test_an_entry_is_relative_to_the_row_it_was_given",),
    ),
    Mutation(
        "activation-statistics-mask",
        "gated_activation/statistics.py",
        'tl.where(wanted, a, float("-inf"))',
        "a",
        "rows that are masked count as zeros in the largest",
        ("test_gated_activation.py::test_statistics_are_those_of_the_reference",),
    ),
    Mutation(
        "activation-receipts-of-others",
        "gated_activation/receipts.py",
        "counts = (kind == _NEURONS) & ~(change < 0.0)",
        "counts = kind == _NEURONS",
        "entries that did not run are counted",
        ("test_gated_activation.py::test_one_launch_sums_the_receipts_of_all_places",),
    ),
]

CLAMP = [
    Mutation(
        "clamp-last-latent",
        "feature_clamp.py",
        "there = i < end",
        "there = i <= end",
        "a row takes the first latent of the next one too",
        ("test_feature_clamp.py::test_any_number_of_latents_fills_its_blocks",),
    ),
    Mutation(
        "clamp-stale-accumulator",
        "feature_clamp.py",
        "added += tl.sum(change[:, None]",
        "added = tl.sum(change[:, None]",
        "only the last block of latents is written back",
        ("test_feature_clamp.py::test_any_number_of_latents_fills_its_blocks",),
    ),
    Mutation(
        "clamp-jump",
        "feature_clamp.py",
        "return tl.where(before <= bound, 0.0, before)",
        "return tl.where(before < bound, 0.0, before)",
        "a latent at its threshold fires",
        ("test_feature_clamp.py::test_a_value_at_the_threshold_of_jumprelu_is_closed",),
    ),
]

SPARSE = [
    Mutation(
        "sparse-last-block",
        "sparse_mlp/index_sets.py",
        "for start in range(0, width, BLOCK_D):",
        "for start in range(0, width - BLOCK_D + 1, BLOCK_D):",
        "the last, incomplete block of the width is left out",
        ("test_sparse_mlp.py::test_the_neurons_of_a_set_and_their_sum_agree_with_float64",),
    ),
    Mutation(
        "sparse-zeros",
        "sparse_mlp/rows.py",
        "active = (row >= 0) & (row < weight_rows) & (value != 0)",
        "active = (row >= 0) & (row < weight_rows)",
        "rows of the down projection are read for neurons that are zero",
        ("test_sparse_mlp.py::test_at_batch_one_a_neuron_that_is_exactly_zero_is_not_read",),
    ),
    Mutation(
        "sparse-threshold",
        "sparse_mlp/rows.py",
        "active = (value != 0) & ~(score < threshold)",
        "active = (value != 0) & (score > threshold)",
        "an input at the threshold is dropped",
        ("test_sparse_mlp_threshold.py::test_a_score_equal_to_the_threshold_is_kept",),
    ),
    Mutation(
        "sparse-other-sets",
        "sparse_mlp/index_sets.py",
        "== this_set\n",
        ">= 0\n",
        "a row is computed with the sets of others",
        ("test_sparse_mlp.py::test_every_row_may_have_a_set_of_its_own",),
    ),
    Mutation(
        "sparse-last-split",
        "sparse_mlp/rows.py",
        "mask=(split < splits)[:, None]",
        "mask=(split < splits - 1)[:, None]",
        "the last split of the neurons is not added",
        ("test_sparse_mlp.py::test_the_neurons_of_a_set_and_their_sum_agree_with_float64",),
    ),
]

PROBES = [
    Mutation(
        "probes-stale-accumulator",
        "probe_statistics/kernel.py",
        "sums += tl.sum(tl.load(tile_totals + place",
        "sums = tl.sum(tl.load(tile_totals + place",
        "only the last tile of rows counts in the total",
        ("test_probe_statistics.py::test_batches_add_up",),
    ),
    Mutation(
        "probes-last-tile",
        "probe_statistics/kernel.py",
        "inside = (tile < tiles)[:, None]",
        "inside = (tile < tiles - 1)[:, None]",
        "the last tile of rows does not count",
        ("test_probe_statistics.py::test_every_tile_of_a_long_prompt_is_added",),
    ),
    Mutation(
        "probes-mask",
        "probe_statistics/kernel.py",
        "use = counted[:, None] & wanted[None, :]",
        "use = inside[:, None] & wanted[None, :]",
        "rows that are masked count",
        ("test_probe_statistics.py::test_rows_all_masked_change_nothing_even_where_they_are_nan",),
    ),
    Mutation(
        "probes-edge",
        "probe_statistics/kernel.py",
        "tl.where(v >= top[None, :], bins + 1, step)",
        "tl.where(v > top[None, :], bins + 1, step)",
        "the upper end of the range falls into the last bin",
        ("test_probe_statistics.py::test_values_on_the_edges_of_bins_belong_to_the_bin_above",),
    ),
]

LENS = [
    Mutation(
        "lens-mask",
        "logit_lens_topk/kernel.py",
        'logits = tl.where(known[None, :], logits, -float("inf"))',
        "logits = tl.where(known[None, :], logits, 0.0)",
        "tokens beyond the vocabulary have a logit of 0",
        ("test_logit_lens_topk.py::test_negative_logits_are_not_beaten_by_what_is_beyond_the_vocabulary",),
    ),
    Mutation(
        "lens-last-block",
        "logit_lens_topk/kernel.py",
        "for start in range(0, D, BLOCK_D):",
        "for start in range(0, D - BLOCK_D + 1, BLOCK_D):",
        "the last, incomplete block of the width is left out",
        ("test_logit_lens_topk.py::test_top_tokens_agree_with_float64_at_odd_shapes",),
    ),
    Mutation(
        "lens-merge",
        "logit_lens_topk/kernel.py",
        "heads = tl.where(tile == winner, following, heads)",
        'heads = tl.where(tile == winner, -float("inf"), heads)',
        "a tile gives its best token and no other",
        ("test_logit_lens_topk.py::test_all_of_the_top_tokens_may_lie_in_one_tile",),
    ),
]

CHOICE = [
    Mutation(
        "choice-mask",
        "token_choice.py",
        'mask=token < vocabulary, other=-float("inf")',
        "mask=token < vocabulary, other=0.0",
        "tokens beyond the vocabulary have a logit of 0",
        ("test_token_choice.py::test_greedy_agrees_with_float64_at_odd_shapes",),
    ),
    Mutation(
        "choice-merge",
        "token_choice.py",
        "return peak, tl.sum(sums * tl.exp(peaks - shift), axis=0), peaks",
        "return peak, tl.sum(sums, axis=0), peaks",
        "sums of tiles are added although they are relative to different maxima",
        ("test_token_choice.py::test_logprobs_agree_with_float64_at_odd_shapes",),
    ),
    Mutation(
        "choice-of-equals",
        "token_choice.py",
        "best = tl.min(tl.where(peaks == peak, candidates, 2147483647), axis=0)",
        "best = tl.max(tl.where(peaks == peak, candidates, -1), axis=0)",
        "of equal logits in two tiles the later is chosen",
        ("test_token_choice.py::test_the_lowest_id_among_equals_is_chosen_within_tiles_and_across",),
    ),
]

MUTATIONS = [
    *ATTENTION,
    *ROPE,
    *RESIDUAL,
    *RECEIPTS,
    *ACTIVATION,
    *CLAMP,
    *SPARSE,
    *PROBES,
    *LENS,
    *CHOICE,
]
