"""The policy file: what it means, and errors that name the field."""

from pathlib import Path

import pytest

from patchclamp_server.engine.request import Priority
from patchclamp_server.rpc.contract import METHODS
from patchclamp_server.security.configuration import ConfigurationError
from patchclamp_server.security.policy import EDIT_KINDS, UNLIMITED, Policy
from patchclamp_server.security.policy_file import parse_policy

GUIDE = Path(__file__).parents[2] / "docs" / "security.md"
WHOLE = """
kill: false
default: {methods: ["ModelService/*"]}
tenants:
  research:
    kill: true
    methods: ["GenerationService/*", "ArtifactService/Get*"]
    models: ["SmolLM*"]
    artifacts: {use: ["joy*", "sha256:*"], tag: ["joy-*"], delete: [], upload: false}
    edits: {kinds: [add, heads], max_edits: 4, max_strength: 2, inline_vectors: false}
    max_concurrent: 8
    max_waiting: 100
    tokens_per_minute: 60000
    max_priority: batch
    weight: 0.5
"""


def parse(text: str) -> Policy:
    return parse_policy(text, "policy.yaml", METHODS)


def test_every_field_arrives():
    policy = parse(WHOLE)
    rules = policy.tenants["research"]
    assert policy.default is not None
    assert (policy.kill, policy.default.methods) == (False, ("ModelService/*",))
    assert (rules.kill, rules.methods, rules.models) == (
        True,
        ("GenerationService/*", "ArtifactService/Get*"),
        ("SmolLM*",),
    )
    artifacts, edits = rules.artifacts, rules.edits
    assert (artifacts.use, artifacts.tag, artifacts.delete) == (("joy*", "sha256:*"), ("joy-*",), ())
    assert not artifacts.upload
    assert (edits.kinds, edits.max_edits, edits.max_strength) == (("add", "heads"), 4, 2.0)
    assert not edits.inline_vectors
    assert (rules.max_concurrent, rules.max_waiting, rules.tokens_per_minute) == (8, 100, 60000)
    assert (rules.max_priority, rules.weight) == (Priority.BATCH, 0.5)


def test_what_an_entry_leaves_out_is_not_limited():
    assert parse("tenants: {research: {}}").tenants["research"] == UNLIMITED
    assert UNLIMITED.edits.kinds == EDIT_KINDS


def test_without_a_default_nobody_else_may_call():
    assert parse("tenants: {research: {}}").default is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file: expected a mapping, got None"),
        ("- a", "the file: expected a mapping"),
        ("tenant: {}", "tenant: unknown; accepted: kill, default, tenants"),
        ("tenants: [a]", "tenants: expected a mapping"),
        ("tenants: {A: {}}", "tenants: 'A' is not the name of a tenant"),
        ("tenants: {1: {}}", "tenants: 1 is not the name of a tenant"),
        ("tenants: {other: {}}", "but not other"),
        ("tenants: {a: }", "tenants.a: expected a mapping, got None"),
        ("tenants: {a: {kill: 1}}", "tenants.a.kill: expected true or false, got 1"),
        ("tenants: {a: {killed: true}}", "tenants.a.killed: unknown; accepted: .*kill"),
        ("tenants: {a: {methods: GenerationService}}", "tenants.a.methods: expected a list"),
        ("tenants: {a: {methods: ['GenerationServices/*']}}", r"tenants.a.methods\[0\]: expected a pattern of methods"),
        ("tenants: {a: {models: [1]}}", r"tenants.a.models\[0\]: expected text, got 1"),
        ("tenants: {a: {artifacts: {use: [''] }}}", r"tenants.a.artifacts.use\[0\]: expected text"),
        ("tenants: {a: {artifacts: {upload: 'yes'}}}", "tenants.a.artifacts.upload: expected true or false"),
        (
            "tenants: {a: {artifacts: {read: []}}}",
            "tenants.a.artifacts.read: unknown; accepted: use, tag, delete, upload",
        ),
        (
            "tenants: {a: {edits: {kinds: [steer]}}}",
            r"tenants.a.edits.kinds\[0\]: expected one of add, .*, got 'steer'",
        ),
        ("tenants: {a: {edits: {max_edits: -1}}}", "tenants.a.edits.max_edits: expected a whole number of at least 0"),
        ("tenants: {a: {edits: {max_strength: .nan}}}", "tenants.a.edits.max_strength: expected a number"),
        ("tenants: {a: {max_waiting: -1}}", "tenants.a.max_waiting: expected a whole number of at least 0"),
        ("tenants: {a: {max_concurrent: 0}}", "tenants.a.max_concurrent: expected a whole number of at least 1"),
        ("tenants: {a: {tokens_per_minute: true}}", "tenants.a.tokens_per_minute: expected a whole number"),
        ("tenants: {a: {max_priority: high}}", "tenants.a.max_priority: expected one of interactive, batch, analysis"),
        ("tenants: {a: {max_priority: [batch]}}", "tenants.a.max_priority: expected one of"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight: expected a number above 0, got 0"),
        ("default: {weight: 1e999}", "default.weight: expected a number above 0"),
        ("tenants: {a: {}", "is not YAML"),
        ("since: 2026-13-45", "is not YAML"),
        ("[" * 1500, "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_an_error_names_the_field_and_what_is_accepted(text: str, message: str):
    with pytest.raises(ConfigurationError, match=f"policy.yaml.*{message}"):
        parse(text)


def test_aliases_that_unfold_to_a_huge_tree_are_refused_in_little_memory():
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 40))
    with pytest.raises(ConfigurationError, match="unknown"):
        parse(f"l0: &l0 [a]\n{levels}\n")
    with pytest.raises(ConfigurationError, match="tenants: expected a mapping"):
        parse(f"l0: &l0 [a]\n{levels}\ntenants: *l39\n")


def test_the_example_of_the_guide_is_a_policy():
    example = GUIDE.read_text().partition("```yaml\n")[2].partition("```")[0]
    rules = parse(example).tenants["research"]
    assert (rules.edits.max_strength, rules.max_priority) == (2.0, Priority.BATCH)
