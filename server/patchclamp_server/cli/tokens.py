"""`patchclamp token`: bearer tokens."""

import argparse
import json
import sys
import time


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("new",), help="new: make a token")
    parser.add_argument("--tenant", required=True, help="whom it is for")
    parser.add_argument("--expires", metavar="TIME", help="after how long, such as 12h or 30d (default: never)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def token(args: argparse.Namespace) -> int:
    """Prints a new token, shown this once, and the line for the file of --tokens. Returns the exit code."""
    from patchclamp_server.security.tokens import new_token, parse_duration

    try:
        expires = None if args.expires is None else time.time() + parse_duration(args.expires)
        presented, kept = new_token(args.tenant, expires)
        line = kept.line
    # A time beyond the calendar raises OverflowError.
    except (ValueError, OverflowError) as error:
        print(f"patchclamp token: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"token": presented, "line": line}))
    else:
        print(f"token, for the client (shown this once):\n  {presented}")
        print(f"line, for the file of --tokens:\n  {line}")
    return 0
