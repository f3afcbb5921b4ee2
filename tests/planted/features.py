"""Defects in features of autoencoders: what is stored, imported, searched, edited and read."""

from planted.mutant import Mutant

SEARCH = "patchclamp_server.analysis.features."
ARTIFACTS = "patchclamp_server.artifacts."
IMPORTERS = ARTIFACTS + "row_formats."
KINDS = "patchclamp_server.interventions.kinds."
SEARCHED = "rpc/test_feature_service.py::"
STATISTICS = "analysis/features/test_statistics.py::"
AUTOENCODER = "artifacts/test_autoencoders.py::"
IMPORTED = "artifacts/test_row_formats.py::"
ORACLE = "engine/test_features.py::"
FORMULA = ORACLE + "test_an_edit_is_the_formula_of_the_oracle"

FEATURES = [
    Mutant(
        "first-tokens-counted",
        SEARCH + "search",
        "rows = [each[self._first :] for each in text.rows]",
        "rows = [torch.cat((each[:1], each[self._first + 1 :])) for each in text.rows]",
        "attention sinks count as tokens of their text, under the side of another one",
        (SEARCHED + "test_a_contrast_equals_numpy_on_the_activations",),
    ),
    Mutant(
        "contrast-with-every-label",
        SEARCH + "search",
        "elif text.label != UNLABELLED and self._by.contrast in (None, text.label):",
        "elif text.label != UNLABELLED:",
        "texts of all other labels are on the side of the one that is named",
        (SEARCHED + "test_a_contrast_of_two_labels_leaves_out_the_others",),
    ),
    Mutant(
        "directions-by-length",
        SEARCH + "search",
        "rows @ direction / rows.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)",
        "rows @ direction",
        "long decoder rows are along every direction",
        (SEARCHED + "test_a_planted_feature_is_found_by_the_token_that_it_stands_for",),
    ),
    Mutant(
        "error-of-the-input",
        SEARCH + "statistics",
        "doubles = outputs.double()",
        "doubles = inputs[:, : outputs.shape[1]].double()",
        "a transcoder is held against what it reads, and not what it reconstructs",
        (STATISTICS + "test_scores_rates_and_explained_variance_equal_numpy",),
    ),
    Mutant(
        "variance-of-one-side",
        SEARCH + "statistics",
        "deviation = ((self._of_sides @ variances) / self._of_sides.sum()).sqrt()",
        "deviation = variances.mean(0).sqrt()",
        "a side of few tokens counts as much as the other in the deviation",
        (STATISTICS + "test_scores_rates_and_explained_variance_equal_numpy",),
    ),
    Mutant(
        "label-of-the-next-feature",
        ARTIFACTS + "feature_labels",
        "if place < len(self._features) and self._features[place] == feature else",
        "if place < len(self._features) else",
        "a feature without a label has that of the next one",
        ("artifacts/test_feature_labels.py::test_a_feature_without_a_label_has_none",),
    ),
    Mutant(
        "reconstruction-without-bias",
        ARTIFACTS + "autoencoders",
        "found = self.decoder_bias.expand(len(activations), -1).clone()",
        "found = torch.zeros(len(activations), self.output_width)",
        "the bias of the decoder is not in the reconstruction",
        (AUTOENCODER + "test_the_reconstruction_is_the_sum_of_decoder_rows_and_the_bias",),
    ),
    Mutant(
        "negative-thresholds",
        ARTIFACTS + "autoencoders",
        'file.tensor("threshold").float().clamp(min=0.0)',
        'file.tensor("threshold").float()',
        "features of a negative threshold are active below 0",
        (AUTOENCODER + "test_encode_equals_numpy_for_all_features_and_for_chosen_ones",),
    ),
    Mutant(
        "subtracted-with-the-other-sign",
        ARTIFACTS + "autoencoders",
        "(self.bias.double() - self.encoder.double() @ self.subtracted.double())",
        "(self.bias.double() + self.encoder.double() @ self.subtracted.double())",
        "what is subtracted from the input is added where it is folded into the bias",
        (AUTOENCODER + "test_rows_of_chosen_features_come_in_their_order_with_the_bias_that_holds_what_is_subtracted",),
    ),
    Mutant(
        "k-of-each-block",
        ARTIFACTS + "autoencoders",
        "both = torch.cat((largest, p), dim=1)",
        "both = p",
        "the k largest are those of the last block of rows",
        (AUTOENCODER + "test_encode_equals_numpy_for_all_features_and_for_chosen_ones",),
    ),
    Mutant(
        "scales-of-the-first-block",
        IMPORTERS + "base",
        "scale = source.scale[start:end].view(",
        "scale = source.scale[: end - start].view(",
        "all blocks of rows have the scales of the first",
        (IMPORTED + "test_a_finetuned_scale_is_folded_into_the_decoder",),
    ),
    Mutant(
        "transcoders-subtract",
        IMPORTERS + "saelens",
        'config.get("apply_b_dec_to_input", not transcoder)',
        'config.get("apply_b_dec_to_input", True)',
        "a transcoder whose configuration does not say so subtracts a bias of another site",
        (IMPORTED + "test_a_transcoder_that_does_not_say_so_subtracts_nothing",),
    ),
    Mutant(
        "rescaled-decoder-forgotten",
        IMPORTERS + "saelens",
        'sources["encoder_bias"] = Source("b_enc", scale=norms)',
        'sources["encoder_bias"] = Source("b_enc")',
        "biases are not rescaled by the norms of the decoder",
        (IMPORTED + "test_activations_rescaled_by_the_norm_of_the_decoder_are_folded_in",),
    ),
    Mutant(
        "finetuned-scale-forgotten",
        IMPORTERS + "saelens",
        "1.0 / norms if finetuned is None else finetuned / norms",
        "1.0 / norms",
        "a finetuned scale is dropped where activations are rescaled by the norms of the decoder",
        (IMPORTED + "test_a_finetuned_scale_is_kept_where_activations_are_rescaled_as_well",),
    ),
    Mutant(
        "order-of-c",
        IMPORTERS + "gemma_scope",
        'transposed=(name == "encoder") is not (NAMES[name] in transposed)',
        'transposed=name == "encoder"',
        "matrices in Fortran's order are read as if they were in C's",
        (IMPORTED + "test_gemma_scope_is_read_at_the_site_and_layer_that_are_given",),
    ),
    Mutant(
        "reconstruction-in-place-of-the-state",
        KINDS + "feature_rules",
        "change = torch.where(self.padding, 0.0, goal - f)",
        "change = torch.where(self.padding, 0.0, goal)",
        "what a feature was before stays in the state beside its target",
        (FORMULA,),
    ),
    Mutant(
        "jumps-of-other-requests",
        KINDS + "feature_rules",
        "torch.where(p <= self._entries.each(self.jump), 0.0, p)",
        "torch.where(p <= self.jump[:1], 0.0, p)",
        "in a batch all features have the thresholds of the first edit",
        (ORACLE + "test_edits_at_one_place_keep_their_own_features_and_thresholds_in_a_batch[operators]",),
    ),
    Mutant(
        "transcoder-read-where-it-writes",
        KINDS + "features",
        "(rows.encoder, rows.decoder, rows.folded_bias, rows.threshold, factor, offset)",
        "(rows.encoder, rows.decoder, rows.bias, rows.threshold, factor, offset)",
        "nothing is subtracted from the state that features are read of",
        (FORMULA,),
    ),
    Mutant(
        "added-to-all",
        KINDS + "features",
        "            return values, none, free",
        "            return one, values, free",
        "scale adds its factor",
        (FORMULA,),
    ),
    Mutant(
        "warned-of-every-target",
        KINDS + "features",
        "(goals > 0) & (goals <= rows.threshold)",
        "(goals <= rows.threshold)",
        "setting a feature to 0 is warned of",
        ("interventions/test_features.py::test_the_receipt_says_that_a_target_is_below_the_threshold_of_a_jumprelu",),
    ),
    Mutant(
        "largest-of-the-most-asked",
        KINDS + "rankings",
        "return [(tuple(v[:n]), tuple(i[:n])) for v, i, n in zip(values, ids, lengths, strict=True)]",
        "return [(tuple(v), tuple(i)) for v, i, n in zip(values, ids, lengths, strict=True)]",
        "in a batch all readouts have as many as the longest",
        (ORACLE + "test_the_largest_of_a_topk_are_read[operators]",),
    ),
]
