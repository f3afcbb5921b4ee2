"""patchclamp http"""

import argparse
import json
import os
import sys
from typing import Any

from patchclamp.cli.options import TLS_OPTIONS, channel_option
from patchclamp.cli.terminal import styled
from patchclamp.connection import DEFAULT_ADDRESS, Connection
from patchclamp.extras import install_line


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("http", help="serve OpenAI's API, and JSON for every RPC, in front of a server")
    parser.add_argument("--json", action="store_true", help="print where it listens as one JSON value")
    listening = parser.add_argument_group("front")
    listening.add_argument(
        "--listen",
        default=os.environ.get("PATCHCLAMP_HTTP", "127.0.0.1:8000"),
        metavar="HOST:PORT",
        help="port 0 takes a free one (default: PATCHCLAMP_HTTP, else 127.0.0.1:8000)",
    )
    listening.add_argument("--listen-cert", metavar="FILE", help="certificate of the front, PEM: serve HTTPS")
    listening.add_argument("--listen-key", metavar="FILE", help="its key, PEM")
    listening.add_argument("--listen-client-ca", metavar="FILE", help="CAs: every caller must show a certificate, PEM")
    listening.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of this origin may call it in a browser, besides its own; repeatable",
    )
    listening.add_argument("--drain-seconds", type=float, default=30.0, help="how long answers may go on after SIGTERM")
    server = parser.add_argument_group("server")
    server.add_argument(
        "--target",
        default=os.environ.get("PATCHCLAMP_ADDRESS", DEFAULT_ADDRESS),
        metavar="ADDRESS",
        help="of gRPC; several servers: ipv4:HOST:PORT,HOST:PORT "
        f"(default: PATCHCLAMP_ADDRESS, else {DEFAULT_ADDRESS})",
    )
    server.add_argument("--tls", nargs="?", const=True, default=False, metavar="ROOTS.pem", help="connect by TLS")
    for option, variable, text in TLS_OPTIONS:
        server.add_argument(
            option, default=os.environ.get(variable), metavar="FILE", help=f"{text} (default: {variable})"
        )
    server.add_argument("--tls-server-name", metavar="NAME", help="name in the server's certificate")
    server.add_argument("--channel-option", action="append", default=[], type=channel_option, metavar="NAME=VALUE")
    server.add_argument("--token-in-clear", action="store_true", help="send tokens to another host without TLS")
    server.add_argument(
        "--timeout",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="deadline of calls whose callers name none (default: none)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from patchclamp_http.app import create_app
        from patchclamp_http.serve import Listening, serve
        from patchclamp_http.serve import run as run_loop
    except ModuleNotFoundError as error:
        hint = f"patchclamp http needs more than the client ({error.name} is missing): {install_line('http')}"
        print(styled(hint, "red", sys.stderr), file=sys.stderr)
        return 1
    files: dict[str, Any] = {
        "certificate": args.listen_cert,
        "key": args.listen_key,
        "client_ca": args.listen_client_ca,
    }
    listening = Listening.parse(args.listen, **files)
    # Callers bring their own tokens: this one has none.
    connection = Connection(
        args.target,
        tls=args.ca or args.tls,
        certificate=args.cert,
        key=args.key,
        token_in_clear=args.token_in_clear,
        tls_server_name=args.tls_server_name,
        channel_options=dict(args.channel_option),
        timeout=args.timeout,
    )

    def ready(url: str) -> None:
        print(json.dumps({"http": url}) if args.json else f"HTTP on {url}, in front of {args.target}", flush=True)

    app = create_app(connection, allow_origins=args.allow_origin)
    run_loop(serve(app, listening, ready, args.drain_seconds))
    return 0
