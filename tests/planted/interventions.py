"""Defects in what programs mean: scopes, strengths, receipts, and what may be shared or reordered."""

from planted.mutant import Mutant

INTERVENTIONS = [
    Mutant(
        "scope-end-is-settled",
        "patchclamp_server.interventions.scopes",
        "if end is not None or start > sequence.prompt_length:",
        "if start > sequence.prompt_length:",
        "a range that ends among the generated tokens runs on past its end",
        (
            "interventions/test_scopes.py::test_a_scope_that_holds_some_generated_tokens_and_not_others_is_not_settled",
            "interventions/test_scopes.py::test_a_range_that_ends_among_the_generated_tokens_ends_there",
        ),
    ),
    Mutant(
        "scope-start-is-settled",
        "patchclamp_server.interventions.scopes",
        "if end is not None or start > sequence.prompt_length:",
        "if end is not None:",
        "a range that begins at a later generated token begins with the first",
        ("interventions/test_scopes.py::test_a_scope_that_holds_some_generated_tokens_and_not_others_is_not_settled",),
    ),
    Mutant(
        "scope-relative-start",
        "patchclamp_server.interventions.scopes",
        "mask &= positions >= (start if start >= 0 else prompt + start)",
        "mask &= positions > (start if start >= 0 else prompt + start)",
        "a range leaves out its first token",
        ("interventions/test_scopes.py::test_the_mask_of_a_scope_is_that_of_the_oracle",),
    ),
    Mutant(
        "scope-role-of-the-model",
        "patchclamp_server.interventions.scopes",
        "own = [(roles[p] if p < len(roles) else GENERATED_ROLE) == selector.role for p in positions]",
        'own = [(roles[p] if p < len(roles) else "") == selector.role for p in positions]',
        "what the model writes is no turn of the assistant",
        ("interventions/test_scopes.py::test_the_mask_of_a_scope_is_that_of_the_oracle",),
    ),
    Mutant(
        "strength-one-token-late",
        "patchclamp_server.interventions.state",
        "bisect_right(starts, p) - 1",
        "bisect_right(starts, p - 1) - 1",
        "a strength that is set in a session holds one token later",
        (
            "engine/test_requests_against_oracle.py::"
            "test_a_strength_set_between_tokens_holds_from_the_next_token_on[llama]",
        ),
    ),
    Mutant(
        "blocks-of-another-strength",
        "patchclamp_server.interventions.state",
        "digest.update(edit.fingerprint + mask.tobytes() + self.strength_at(i, positions[mask]).tobytes())",
        "digest.update(edit.fingerprint + mask.tobytes())",
        "a prefix is shared with a program of another strength",
        ("engine/test_prefix_cache.py::test_another_strength_is_another_prefix",),
    ),
    Mutant(
        "blocks-behind-a-latch",
        "patchclamp_server.interventions.state",
        "return self._first_in_scope([e.gate.scope for e in self.bound.edits if e.gate and e.latched], token_ids)",
        "return len(token_ids)",
        "blocks are shared whose values depend on a latch",
        ("engine/test_against_oracle.py::test_blocks_of_another_program_are_not_taken_for_its_own",),
    ),
    Mutant(
        "norm-preserving-edits-commute",
        "patchclamp_server.interventions.stages",
        "if a.kind is not b.kind or a.preserve_norm or b.preserve_norm:",
        "if a.kind is not b.kind:",
        "two additions of one site that preserve the norm run as one",
        ("interventions/test_invariants.py::test_additions_that_preserve_the_norm_run_one_after_the_other",),
    ),
    Mutant(
        "edits-of-one-neuron-commute",
        "patchclamp_server.interventions.kinds.kind",
        "return not set(a[0].tolist()) & set(b[0].tolist())",
        "return True",
        "two edits of the same neurons run as one",
        ("engine/test_against_oracle.py::test_alone[llama-edits that could run as one]",),
    ),
    Mutant(
        "gate-at-its-own-site",
        "patchclamp_server.interventions.bind",
        "if (gate.layer, gate.site.order) >= first:",
        "if (gate.layer, gate.site.order) > first:",
        "a gate may look at the site that its own edit changes",
        ("interventions/test_bind.py::test_a_gate_at_the_site_of_its_own_edit_or_behind_it_is_refused",),
    ),
    Mutant(
        "one-fingerprint-for-all-readouts",
        "patchclamp_server.interventions.bind",
        "digest.update(repr((readout.ids, readout.k, readout.heads)).encode())",
        "pass",
        "programs that read other neurons have the same fingerprint",
        ("interventions/test_bind.py::test_programs_that_read_other_things_have_other_fingerprints",),
    ),
    Mutant(
        "table-rows-lost",
        "patchclamp_server.interventions.ranges",
        "merged[-1] = (merged[-1][0], merged[-1][1] + length)",
        "merged[-1] = (merged[-1][0], length)",
        "rows of a table are lost when neighbours are given back",
        ("interventions/test_ranges.py",),
    ),
]
