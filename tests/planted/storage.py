"""Defects in artifacts, and in who may do what."""

from planted.mutant import Mutant

STORE, ACCESS = "patchclamp_server.artifacts.store", "patchclamp_server.security.access"

STORAGE = [
    Mutant(
        "tag-before-its-object",
        STORE,
        'self._blobs.write_all(contents | {f"tags/{tag}": (artifact_id.encode(),) for tag in tags.names})',
        'self._blobs.write_all({f"tags/{tag}": (artifact_id.encode(),) for tag in tags.names} | contents)',
        "a crash between two renames leaves a tag without its object",
        (
            "artifacts/test_store.py::"
            "test_a_kill_between_two_names_leaves_an_object_without_a_tag_and_no_tag_without_its_object[put]",
        ),
    ),
    Mutant(
        "object-before-its-tags",
        STORE,
        "for tag in tags:\n                with suppress(FileNotFoundError):",
        "self._blobs.remove(_object_path(artifact_id))\n            for tag in tags:\n"
        "                with suppress(FileNotFoundError):",
        "a crash in a deletion leaves a tag without its object",
        (
            "artifacts/test_store.py::"
            "test_a_kill_between_two_names_leaves_an_object_without_a_tag_and_no_tag_without_its_object[delete]",
        ),
    ),
    Mutant(
        "page-that-skips-one",
        STORE,
        "start = bisect_right(ids, parse_page_token(page_token, *query))",
        "start = bisect_right(ids, parse_page_token(page_token, *query)) + bool(page_token)",
        "an artifact between two pages is on neither",
        ("artifacts/test_store.py::test_pages_show_every_artifact_once_in_one_order",),
    ),
    Mutant(
        "deleted-under-its-other-names",
        STORE,
        "if ref != artifact_id and len(tags) > 1:",
        "if False:",
        "one of several tags deletes what the others name",
        ("artifacts/test_store.py::test_an_artifact_is_not_deleted_by_one_of_several_tags",),
    ),
    Mutant(
        "first-in-first-out",
        "patchclamp_server.artifacts.cache",
        "self._entries.move_to_end(artifact_id)",
        "pass",
        "what was used last is dropped first",
        ("artifacts/test_store.py::test_the_cache_keeps_what_fits_and_drops_the_least_recently_used",),
    ),
    Mutant(
        "page-of-another-query",
        "patchclamp_server.artifacts.pages",
        "if not isinstance(after, str) or digest != _digest(query):",
        "if not isinstance(after, str):",
        "a page token of another listing is taken",
        ("artifacts/test_store.py::test_a_page_token_of_another_query_and_a_bad_page_size_are_refused",),
    ),
    Mutant(
        "tokens-never-expire",
        "patchclamp_server.security.tokens",
        "if found.expires is not None and found.expires <= time.time():",
        "if False:",
        "a token is good after its time",
        ("security/test_token_file.py::test_a_token_is_good_up_to_its_time",),
    ),
    Mutant(
        "bucket-without-a-bottom",
        "patchclamp_server.security.token_bucket",
        "min(self._balance + (now - self._at) * self.per_minute / 60, float(self.per_minute))",
        "self._balance + (now - self._at) * self.per_minute / 60",
        "an idle tenant saves up tokens without bound",
        ("security/test_token_bucket.py::test_a_bucket_holds_no_more_than_a_minute_brings",),
    ),
    Mutant(
        "newcomers-pass-the-line",
        "patchclamp_server.security.tenants",
        "if self._has_place() and not self.waiting:",
        "if self._has_place():",
        "a new call takes the place that another one waits for",
        ("security/test_tenants.py::test_a_call_that_comes_while_others_wait_goes_behind_them",),
    ),
    Mutant(
        "negative-strengths-are-weak",
        ACCESS,
        "abs(strength) > rules.max_strength",
        "strength > rules.max_strength",
        "a negative strength passes every ceiling",
        ("security/test_access.py::test_a_ceiling_on_the_strength_holds_on_both_sides_of_zero",),
    ),
    Mutant(
        "priority-of-ones-choice",
        ACCESS,
        "priority=max(request.priority, rules.max_priority)",
        "priority=request.priority",
        "a tenant runs at a priority that its rules do not allow",
        ("security/test_access.py::test_a_request_runs_at_the_priority_of_its_tenant_at_most",),
    ),
    Mutant(
        "one-tag-deletes-all",
        ACCESS,
        "names and all(matches(delete, name) for name in names)",
        "names and any(matches(delete, name) for name in names)",
        "an artifact that others have tagged can be deleted",
        ("rpc/test_security_policy.py::test_what_others_have_tagged_is_not_deleted",),
    ),
    Mutant(
        "audit-follows-a-renamed-file",
        "patchclamp_server.security.audit",
        "if self._file is None or self._was_moved(self._file):",
        "if self._file is None:",
        "lines go to a log that was rotated away",
        ("security/test_audit_log.py::test_a_renamed_file_is_left_alone_and_a_new_one_begun",),
    ),
]
