"""Pings of clients, which keep quiet connections open."""

import pytest
from live import LiveServer

from patchclamp import Client, PatchclampError
from patchclamp.connection import Connection
from patchclamp_server.rpc.server import MIN_PING_MILLISECONDS


def test_a_quiet_stream_whose_client_pings_often_runs_to_its_deadline(live_server: LiveServer):
    """gRPC sends one a second at most, and left to itself ends the connection at the fourth ("Too many pings")."""
    with (
        Client(live_server.address, channel_options={"grpc.keepalive_time_ms": 150}) as client,
        client.session("hello", lockstep=True, timeout=6.0) as quiet,
        pytest.raises(PatchclampError, match="DEADLINE_EXCEEDED"),
    ):
        quiet.result()


def test_the_client_pings_by_itself_and_less_often_than_the_server_allows():
    options = dict(Connection().options)
    assert MIN_PING_MILLISECONDS < int(options["grpc.keepalive_time_ms"]) <= 60_000
    # Else gRPC stops after two pings without an answer of the server's own.
    assert options["grpc.http2.max_pings_without_data"] == 0
