"""Defects between the engine and the client."""

from planted.mutant import Mutant

STREAM = "patchclamp_server.rpc.streams.stream"

RPC = [
    Mutant(
        "held-sequence-sleeps-on",
        STREAM,
        "if 2 * values >= MAX_WAITING_VALUES:",
        "if values >= MAX_WAITING_VALUES:",
        "a sequence that was held back while a batch was read is not woken by it",
        ("rpc/test_stream.py::test_a_batch_that_may_have_been_half_of_a_full_stream_is_told_of",),
    ),
    Mutant(
        "held-sequence-woken-too-early",
        STREAM,
        "        self._read_values += values\n",
        "        asyncio.get_running_loop().call_soon(setattr, self, '_read_values', self._read_values + values)\n",
        "whoever is woken finds the stream as full as before",
        ("rpc/test_stream.py::test_whoever_is_told_of_a_read_finds_the_stream_no_longer_full",),
    ),
    Mutant(
        "one-wake-up-a-stream",
        STREAM,
        "if not self._scheduled:",
        "if True:",
        "every stream of a step wakes the loop",
        ("rpc/test_stream.py::test_one_wake_up_serves_every_stream_of_a_step",),
    ),
    Mutant(
        "session-that-is-never-spent",
        "patchclamp_server.rpc.streams.session",
        "self._delivered >= self._granted",
        "self._delivered > self._granted",
        "a lockstep session whose client has closed its side never ends",
        ("rpc/test_session.py::test_a_lockstep_client_that_closes_its_side_gets_what_it_granted",),
    ),
    Mutant(
        "late-readouts-twice",
        "patchclamp_server.rpc.call.response_builder",
        "self._late.clear()",
        "pass",
        "readouts that came after their token come with every later token too",
        ("rpc/test_stream.py::test_a_late_readout_rides_on_one_token_alone",),
    ),
    Mutant(
        "failure-tells-its-inside",
        "patchclamp_server.rpc.call.errors",
        "message = INTERNAL_MESSAGE if is_internal else _shortened(error.message)",
        "message = _shortened(error.message)",
        "a client is told what only the log should say",
        ("rpc/test_errors.py::test_a_failure_of_the_server_tells_nothing_of_its_inside",),
    ),
    Mutant(
        "items-twice",
        "patchclamp_server.interventions.field_checks",
        "if value in seen:",
        "if False:",
        "a neuron that is listed twice is watched twice",
        (
            "rpc/test_monitoring_codec.py::test_a_wrong_item_is_refused_by_its_path",
            "analysis/steering/test_steering_service.py::test_what_cannot_be_extracted_is_refused_by_field",
        ),
    ),
    Mutant(
        "waiting-activations-never-read",
        "patchclamp_server.rpc.streams.watch",
        "self._waiting -= len(event.items)",
        "pass",
        "a reader who keeps up loses activations all the same",
        ("rpc/test_watch_stream.py::test_there_is_room_again_for_what_comes_after_a_batch_was_read",),
    ),
    Mutant(
        "progress-of-before",
        "patchclamp_server.rpc.streams.watch",
        "is_news = self._latest is None\n            self._latest = (tokens, total)",
        "is_news = self._latest is None\n            self._latest = self._latest or (tokens, total)",
        "of progress that was not read the first is kept",
        ("rpc/test_watch_stream.py::test_of_progress_that_was_not_read_only_the_latest_is_kept",),
    ),
    Mutant(
        "upload-space-is-kept",
        "patchclamp_server.rpc.call.upload_space",
        "            self.bytes -= size\n",
        "",
        "an upload that was left keeps its bytes",
        ("rpc/test_overload.py::test_an_upload_that_is_left_gives_back_its_bytes_and_its_file",),
    ),
    Mutant(
        "sides-of-two-seeds",
        "patchclamp_server.rpc.streams.comparison",
        "sampling = replace(sampling, seed=drawn_seed())",
        "pass",
        "the sides of a comparison differ by their seeds where the client gave none",
        ("rpc/test_generation_service.py::test_compare_gives_both_sides_the_same_seed",),
    ),
    Mutant(
        "float16-by-its-bits",
        "patchclamp_server.interventions.tensor_messages",
        "expected_bytes = math.prod(shape) * dtype.itemsize",
        "expected_bytes = len(proto.data) // dtype.itemsize * dtype.itemsize",
        "bytes that do not fill the shape are an error of the server's own",
        ("rpc/test_bad_input.py",),
    ),
]
