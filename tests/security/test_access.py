"""What the rules of a tenant make of one request."""

import pytest
from programs import edit, shapes

from patchclamp_server.engine.request import Priority, Request
from patchclamp_server.errors import PermissionDenied
from patchclamp_server.model.sites import Site
from patchclamp_server.security.access import Access, check_edits, check_strength
from patchclamp_server.security.policy import EditRules, TenantRules
from patchclamp_server.security.record import CallRecord
from patchclamp_server.security.tenants import Tenant

RULES = EditRules(max_strength=2.0)


@pytest.mark.parametrize("strength", [2.0, -2.0, 0.0])
def test_strengths_up_to_the_ceiling_are_allowed(strength: float) -> None:
    check_strength(strength, RULES, "strength")


@pytest.mark.parametrize("strength", [2.5, -2.5, -1e9])
def test_a_ceiling_on_the_strength_holds_on_both_sides_of_zero(strength: float) -> None:
    with pytest.raises(PermissionDenied) as refused:
        check_strength(strength, RULES, "set_strength.strength")
    assert refused.value.field == "set_strength.strength"
    with pytest.raises(PermissionDenied) as refused:
        check_edits((edit("add", Site.RESID_POST, shapes("llama"), strength=strength),), RULES)
    assert refused.value.field == "program.edits[0].strength"


@pytest.mark.parametrize(
    ("most", "asked", "given"),
    [
        (Priority.BATCH, Priority.INTERACTIVE, Priority.BATCH),
        (Priority.BATCH, Priority.ANALYSIS, Priority.ANALYSIS),
        (Priority.INTERACTIVE, Priority.INTERACTIVE, Priority.INTERACTIVE),
    ],
)
def test_a_request_runs_at_the_priority_of_its_tenant_at_most(most: Priority, asked: Priority, given: Priority) -> None:
    access = Access(Tenant("t", TenantRules(max_priority=most)), CallRecord())
    assert access.admit(Request((5,), lambda event: None, priority=asked)).priority == given
