"""Bearer tokens: what the server keeps of them, and what it says to a wrong one."""

import hashlib
import subprocess
import sys
import time

import pytest

from patchclamp_server.errors import Unauthenticated
from patchclamp_server.security.configuration import ConfigurationError
from patchclamp_server.security.tokens import TokenTable, new_token, parse_duration, parse_tokens

DIGEST = hashlib.sha256(b"t").hexdigest()


def reason(table: TokenTable, presented: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        table.find(presented)
    return caught.value.reason


def test_a_new_token_is_found_by_the_line_that_was_made_for_it():
    presented, kept = new_token("research")
    found = parse_tokens(f"# people\n\n{kept.line}  # of Ada\n", "tokens").find(presented)
    assert (found.tenant, found.expires, found.id) == ("research", None, kept.id)


def test_the_line_does_not_hold_the_token():
    presented, kept = new_token("research")
    assert presented.removeprefix("patchclamp_") not in kept.line
    assert len(presented.removeprefix("patchclamp_")) == 43  # 256 bits in base64


def test_two_tokens_of_a_tenant_differ():
    assert new_token("a")[0] != new_token("a")[0]


def test_a_token_that_is_not_in_the_file_is_unknown():
    table = parse_tokens(new_token("research")[1].line, "tokens")
    assert reason(table, new_token("research")[0]) == "TOKEN_UNKNOWN"


def test_a_token_is_good_up_to_its_time():
    presented, kept = new_token("research", time.time() + 3600)
    assert parse_tokens(kept.line, "tokens").find(presented).tenant == "research"
    presented, kept = new_token("research", time.time() - 1)
    assert reason(parse_tokens(kept.line, "tokens"), presented) == "TOKEN_EXPIRED"


def test_text_of_any_kind_is_a_wrong_token_and_no_more():
    assert reason(parse_tokens("", "tokens"), "\udcff é") == "TOKEN_UNKNOWN"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"No sha256:{DIGEST}", "line 2: 'No' is not the name of a tenant"),
        ("research", "line 2: after the tenant, expected sha256: and 64 hex digits"),
        (f"research sha256:{DIGEST[:-1]}", "line 2: after the tenant"),
        (f"research sha256:{DIGEST} 2026-12-31", "line 2: expected expires= and a time"),
        (f"research sha256:{DIGEST} expires=2026-12-31T00:00:00Z more", "line 2: 4 words"),
        (f"a sha256:{DIGEST}\nb sha256:{DIGEST}", "line 3: the token is listed twice"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str):
    with pytest.raises(ConfigurationError, match=message):
        parse_tokens(f"# tokens\n{line}\n", "file")


def test_a_token_written_into_the_file_by_mistake_is_not_repeated_in_the_error():
    with pytest.raises(ConfigurationError) as caught:
        parse_tokens("research patchclamp_secret", "file")
    assert "secret" not in str(caught.value)


def test_durations_have_a_unit():
    assert [parse_duration(text) for text in ("90s", "15m", "12h", "30d", "2w")] == [90, 900, 43200, 2592000, 1209600]
    for text in ("30", "d", "-1d", "1.5h", "0d"):
        with pytest.raises(ValueError, match="is not a duration"):
            parse_duration(text)


def test_the_command_prints_the_token_and_its_line():
    command = [sys.executable, "-m", "patchclamp", "token", "new", "--tenant", "research", "--expires", "1d"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = parse_tokens(lines[3], "output").find(lines[1].strip())
    assert found.tenant == "research"
    assert found.expires == pytest.approx(time.time() + 86400, abs=600)


def test_the_command_refuses_what_is_no_tenant():
    command = [sys.executable, "-m", "patchclamp", "token", "new", "--tenant", "No One"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "is not the name of a tenant" in refused.stderr
