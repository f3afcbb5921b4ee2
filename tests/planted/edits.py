"""Defects in the youngest kinds of edits and readouts: patches, maps of low and full rank, rotations, activations."""

from planted.mutant import Mutant

KINDS = "patchclamp_server.interventions.kinds."
PATCH = "interventions/test_patch.py::"
MAPS = "engine/test_stored_maps.py::"
APPLIED = MAPS + "test_a_stored_map_is_applied_as_the_oracle_does"

EDITS = [
    Mutant(
        "from-the-end-of-the-rows",
        KINDS + "patch",
        "row_of.get(wanted if wanted >= 0 else source.length + wanted)",
        "row_of.get(wanted if wanted >= 0 else len(own) + wanted)",
        "positions from the end are counted among the rows that are stored",
        (PATCH + "test_rows_of_a_stored_text_are_mapped_by_their_positions",),
    ),
    Mutant(
        "rows-in-the-order-of-the-file",
        KINDS + "patch",
        "return torch.cat(parts).index_select(0, place)",
        "return torch.cat(parts)[: len(place)]",
        "rows go to positions in the order in which they are stored",
        (PATCH + "test_rows_of_a_stored_text_are_mapped_by_their_positions",),
    ),
    Mutant(
        "sources-of-the-first-patch",
        KINDS + "patch",
        "keys = self._which + context.positions",
        "keys = 0 * self._which + context.positions",
        "in a batch every patched request gets the rows of the first",
        (PATCH + "test_patches_of_a_batch_put_their_own_rows_at_their_own_positions",),
    ),
    Mutant(
        "patched-all-heads",
        KINDS + "patch",
        "heads = torch.zeros(info.n_heads, info.head_dim)",
        "heads = torch.ones(info.n_heads, info.head_dim)",
        "heads that are not named are patched as well",
        (PATCH + "test_patching_heads_leaves_the_other_heads_alone[operators]",),
    ),
    Mutant(
        "later-position-forgotten",
        "patchclamp_server.interventions.placing",
        "scope = Scope(edit.scope.include, (*edit.scope.exclude, *_all_but(positions)))",
        "scope = Scope(edit.scope.include, _all_but(positions))",
        "a patch touches tokens that its scope excludes",
        (PATCH + "test_positions_find_their_tokens_in_a_prompt_of_any_length",),
    ),
    Mutant(
        "one-block-for-two-lengths",
        "patchclamp_server.interventions.placing",
        "return replace(edit, payload=payload, scope=scope, fingerprint=digest)",
        "return replace(edit, payload=payload, scope=scope)",
        "prompts of two lengths share cached tokens that were patched with other rows",
        (PATCH + "test_prompts_that_begin_alike_and_are_patched_from_their_ends_share_no_wrong_block",),
    ),
    Mutant(
        "subspace-of-the-first-layer",
        KINDS + "low_rank",
        "found = artifact.subspace(layer)",
        "found = artifact.subspace(where.layers[0])",
        "every layer of an edit has the subspace of the first",
        (APPLIED + "[low_rank of each layer-False]",),
    ),
    Mutant(
        "turned-the-other-way",
        KINDS + "rotate_in_plane",
        "[[cosine, -sine], [sine, cosine]]",
        "[[cosine, sine], [-sine, cosine]]",
        "a turn goes from the second axis to the first",
        (APPLIED + "[a turn about its own centres-False]",),
    ),
    Mutant(
        "turned-about-0",
        KINDS + "rotate_in_plane",
        "(at - turn @ at).float()",
        "torch.zeros(2)",
        "a turn is about the origin, whatever its centre",
        (APPLIED + "[a turn about a centre-False]",),
    ),
    Mutant(
        "centre-of-the-artifact-first",
        KINDS + "rotate_in_plane",
        "own if centre is None else centre, kind.radians",
        "centre if own is None else own, kind.radians",
        "a centre that is given is not taken where the artifact has one",
        (APPLIED + "[a turn about a centre-False]",),
    ),
    Mutant(
        "axes-askew",
        KINDS + "rotate_in_plane",
        "second = second - (second @ first) * first",
        "second = second - 0.0 * first",
        "axes that are not orthogonal turn what is not in their plane",
        (MAPS + "test_a_turn_there_and_back_leaves_the_state_as_it_was",),
    ),
    Mutant(
        "factors-exchanged",
        KINDS + "affine",
        "(left @ right.T, bias)",
        "(right @ left.T, bias)",
        "beside a full matrix a map in factors is its transpose",
        (APPLIED + "[maps of both forms-False]",),
    ),
    Mutant(
        "map-without-bias",
        KINDS + "affine",
        "torch.cat((torch.zeros(left.shape[1]), torch.ones(1)))",
        "torch.zeros(left.shape[1] + 1)",
        "the bias of a map in factors is not added",
        ("interventions/test_affine.py::test_a_matrix_and_its_factors_are_one_edit_also_side_by_side[False]",),
    ),
    Mutant(
        "units-of-the-first-reader",
        KINDS + "activations",
        "units[end - len(ids) : end]",
        "units[: len(ids)]",
        "in a batch every readout has the values of the first",
        ("engine/test_activation_readouts.py::test_requests_of_a_batch_read_their_own_units_of_one_place[operators]",),
    ),
]
