"""A server that says that it is ready has compiled what requests run: nobody waits for a compiler."""

import os
import subprocess
import sys

# A process of its own: in this one other tests have compiled everything. Of numba, an event is a function that is
# compiled for some types, or read from the cache of another process.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads
configure_threads(), keep_compiled_code()
from numba.core import event
from live import LiveServer
from patchclamp import Client, Program
from patchclamp.programs import (
    abort_when, ablate_heads, add, add_neurons, affine, cap_projection, clamp_neurons, low_rank, mean_heads,
    project_out, read_activation, read_heads, read_logit_lens, read_neurons, read_projection, read_top_neurons, replace,
    rotate_in_plane, rotate_towards, set_neurons, set_projection, uniform_heads, when,
)
from patchclamp_server.model.load import load_model

model = load_model("embedded")
with LiveServer(model, Path(sys.argv[1])) as live, Client(live.address) as client:
    spec = model.decoder.spec
    v = np.linspace(-1, 1, spec.d_model).astype(np.float32)
    plane, rank = np.stack([v, v[::-1] + v**2]), np.stack([v, v**2])
    edits = [
        add(v, layers=3), add(v, layers=4, preserve_norm=True), project_out(v, layers=5),
        cap_projection(v, max=1.0, layers=6), set_projection(v, 2.0, layers=7), replace(v, layers=8, strength=0.1),
        rotate_towards(v, 0.1, layers=9), rotate_in_plane(plane, 0.1, layers=10),
        low_rank(rank, rank, np.zeros(2, np.float32), layers=11), affine(left=rank.T, right=rank.T, layers=12),
        set_neurons([1], 2.0, layers=5), add_neurons([2], 1.0, layers=5), clamp_neurons([3], max=0.0, layers=5),
        add(v, layers=13, gate=when(v, layer=2, above=-1e9)),
        ablate_heads([0], layers=7), uniform_heads([1], layers=7),
        mean_heads([2], np.zeros((1, spec.head_dim), np.float32), layers=7),
    ]
    readouts = [
        read_neurons([1, 2], layers=4), read_top_neurons(3, layers=4), read_projection([v], layers=8),
        read_logit_lens(3, layers=9), read_heads(layers=9), read_activation(layers=9),
    ]
    program = Program(edits=edits, readouts=readouts, abort_when=[abort_when(v, layer=2, above=1e9)])
    with event.install_recorder("numba:compile") as recorder:
        for prompt, edits in (("The capital of France is", None), ("one two three four " * 80, None), ("So", program)):
            client.generate(prompt, program=edits, max_tokens=4).result()
        names = {str(seen.data["dispatcher"].py_func.__name__) for _, seen in recorder.buffer if seen.is_start}
print(sorted(names))
"""


def test_requests_compile_nothing(tmp_path: object) -> None:
    paths = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert output.stdout.splitlines()[-1] == "[]"
