"""Options of `patchclamp serve`: the command line over PATCHCLAMP_* variables over defaults."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from patchclamp_server.cli.commands import main
from patchclamp_server.cli.options import ENGINE_OPTIONS, SWITCHES, add_serve_arguments, config_from
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.rpc.at_start import check_files, load
from patchclamp_server.rpc.config import ServerConfig, WatchAtStart
from patchclamp_server.security.configuration import ConfigurationError


def parse(*arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve_arguments(parser)
    return config_from(parser.parse_args(arguments))


def test_nothing_given_gives_the_defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PATCHCLAMP_ADDRESS", raising=False)
    assert parse() == ServerConfig()


def test_artifacts_are_kept_in_the_data_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert parse().artifacts_url == str(tmp_path / "patchclamp" / "artifacts")


def test_a_variable_is_read_and_converted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATCHCLAMP_MAX_SEQUENCES", "7")
    monkeypatch.setenv("PATCHCLAMP_DRAIN_SECONDS", "1.5")
    config = parse()
    assert (config.engine, config.drain_seconds) == (EngineConfig(max_sequences=7), 1.5)


def test_the_command_line_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATCHCLAMP_MODEL", "other")
    assert parse("--model", "mine").model == "mine"


def test_the_prefix_cache_can_be_turned_off():
    assert not parse("--prefix-cache", "off").engine.enable_prefix_cache


def test_the_slowdown_beside_analysis_is_a_number_above_1():
    assert parse("--analysis-slowdown", "1.25").engine.analysis_slowdown == 1.25
    with pytest.raises(argparse.ArgumentError, match="expected a number above 1, got 1"):
        parse("--analysis-slowdown", "1")


def test_kernels_and_graphs_are_left_to_the_device_unless_given():
    assert (parse().engine.kernels, parse().engine.decode_graphs) == (None, None)
    engine = parse("--kernels", "on", "--decode-graphs", "off").engine
    assert (engine.kernels, engine.decode_graphs) == (True, False)


def test_batch_invariance_is_left_to_dtype_and_device_unless_given(monkeypatch: pytest.MonkeyPatch):
    assert parse().engine.batch_invariant is None
    assert parse("--batch-invariant", "off").engine.batch_invariant is False
    monkeypatch.setenv("PATCHCLAMP_BATCH_INVARIANT", "on")
    assert parse().engine.batch_invariant is True


@pytest.mark.parametrize("options", [("--dtype", "bfloat16"), ("--device", "cuda"), ("--kernels", "on")])
def test_batch_invariance_is_refused_by_name_where_it_cannot_be_promised(options: tuple[str, ...]):
    with pytest.raises(ConfigurationError, match=f"^--batch-invariant on holds with .*{options[1]}"):
        load(parse("--batch-invariant", "on", *options))


def test_keys_and_values_are_of_the_dtype_of_the_model_unless_given(monkeypatch: pytest.MonkeyPatch):
    assert parse().engine.kv_dtype == "model"
    assert parse("--kv-dtype", "int8").engine.kv_dtype == "int8"
    monkeypatch.setenv("PATCHCLAMP_KV_DTYPE", "bfloat16")
    assert parse().engine.kv_dtype == "bfloat16"
    with pytest.raises(argparse.ArgumentError):
        parse("--kv-dtype", "int4")


@pytest.mark.parametrize("options", [("--dtype", "float16"), ("--device", "cuda"), ("--kernels", "on")])
def test_keys_in_fewer_bits_are_refused_by_name_where_nothing_reads_them(options: tuple[str, ...]):
    with pytest.raises(ConfigurationError, match=f"^--kv-dtype int8 holds with .*{options[1]}"):
        load(parse("--kv-dtype", "int8", *options))


def test_activations_are_float32_unless_given(monkeypatch: pytest.MonkeyPatch):
    assert parse().activations == "float32"
    assert parse("--activations", "int8").activations == "int8"
    monkeypatch.setenv("PATCHCLAMP_ACTIVATIONS", "int8")
    assert parse().activations == "int8"


@pytest.mark.parametrize(
    "options", [("--dtype", "bfloat16"), ("--device", "cuda"), ("--kernels", "on"), ("--batch-invariant", "off")]
)
def test_activations_in_8_bits_are_refused_by_name_where_no_product_takes_them(options: tuple[str, ...]):
    with pytest.raises(ConfigurationError, match=f"^--activations int8 holds with .*{options[1]}"):
        load(parse("--activations", "int8", *options))


def test_watches_of_all_uses_run_from_the_start():
    given = parse("--watch", "joy=joyful@usual", "--watch", "toxic=sha256:12,heads=retrieval").watches
    assert given == (
        WatchAtStart("joy", "joyful", "usual"),
        WatchAtStart("toxic", "sha256:12"),
        WatchAtStart("heads", "retrieval"),
    )


def test_watches_come_from_the_variable_where_none_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATCHCLAMP_WATCH", "joy=joyful,toxic=set@usual")
    assert parse().watches == (WatchAtStart("joy", "joyful"), WatchAtStart("toxic", "set", "usual"))
    assert parse("--watch", "other=one").watches == (WatchAtStart("other", "one"),)


@pytest.mark.parametrize("value", ["joyful", "joy=", "=joyful", "joy=joyful@", "a=b@c@d", "a=b=c"])
def test_what_is_no_watch_is_refused(value: str):
    with pytest.raises(argparse.ArgumentError):
        parse("--watch", value)


def test_checkpoints_to_match_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    a, b = str(tmp_path / "a"), str(tmp_path / "b.gguf")
    Path(a).mkdir()
    Path(b).touch()
    given = parse("--match-model", f"tuned={a},older={b}", "--match-model", f"same={a}").match_models
    assert given == (("tuned", a), ("older", b), ("same", a))
    monkeypatch.setenv("PATCHCLAMP_MATCH_MODEL", f"tuned={a}")
    assert parse().match_models == (("tuned", a),)


@pytest.mark.parametrize("value", ["tuned", "tuned=", "=/", "tuned=/no/such/place"])
def test_what_is_no_checkpoint_is_refused(value: str):
    with pytest.raises(argparse.ArgumentError):
        parse("--match-model", value)


def test_a_name_of_two_checkpoints_is_refused_before_the_model_is_loaded(tmp_path: Path):
    twice = parse("--match-model", f"tuned={tmp_path}", "--match-model", f"tuned={tmp_path.parent}")
    with pytest.raises(ConfigurationError, match="'tuned' twice"):
        check_files(twice)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PATCHCLAMP_DTYPE", "int4"),
        ("PATCHCLAMP_ADDRESS", "localhost"),
        ("PATCHCLAMP_METRICS_ADDRESS", "0.0.0.0:99999"),
        ("PATCHCLAMP_MAX_SEQUENCES", "-1"),
        ("PATCHCLAMP_DRAIN_SECONDS", "inf"),
        ("PATCHCLAMP_WATCH", "joyful"),
    ],
)
def test_a_wrong_variable_is_refused_like_a_wrong_option(monkeypatch: pytest.MonkeyPatch, variable: str, value: str):
    monkeypatch.setenv(variable, value)
    with pytest.raises(argparse.ArgumentError):
        parse()


def test_the_threads_that_are_asked_for_are_those_of_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    program = (
        "from patchclamp_server.cli.commands import main\n"
        "here = '127.0.0.1:0'\n"
        "main(['--threads', '1', '--model', '/missing.gguf', '--address', here, '--metrics-address', here])\n"
        "import torch; print(torch.get_num_threads())"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "1\n"


def test_the_help_says_the_default_of_every_option_of_the_engine_and_what_a_switch_takes():
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    options = {action.dest: action for action in parser._actions}
    for name in set(ENGINE_OPTIONS) - {"max_waiting_kv_tokens"}:
        text, default = options[name].help or "", getattr(EngineConfig(), name)
        assert f"(default: {default:g}" in text or f"(default: {default}" in text, name
    for name in ("prefix_cache", "kernels", "batch_invariant", "decode_graphs", *SWITCHES):
        assert options[name].metavar == "on|off", name


def test_reading_the_options_imports_no_torch():
    code = (
        "import argparse, sys; from patchclamp_server.cli.options import add_serve_arguments;"
        "add_serve_arguments(argparse.ArgumentParser()); print('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"


@pytest.mark.parametrize("address", ["unix:socket", "9464", "a:b:1"])
def test_the_metrics_address_is_told_what_it_takes(address: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--metrics-address", address])
    assert f"expected host:port or [IPv6 address]:port, got '{address}'" in capsys.readouterr().err
