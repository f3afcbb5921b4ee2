#!/usr/bin/env bash
# Generates the Python code of the contract into the directory given (patchclamp/v1 below it).
set -euo pipefail
cd "$(dirname "$0")"
out=$(cd .. && cd "$1" && pwd)
python -m grpc_tools.protoc -I . --python_out="$out" --grpc_python_out="$out" \
    --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" \
    patchclamp/v1/*.proto
touch "$out/patchclamp/v1/__init__.py"
