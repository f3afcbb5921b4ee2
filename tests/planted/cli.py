"""Defects of the command line of the server."""

from planted.mutant import Mutant

CLI = [
    Mutant(
        "slowdown-of-nothing",
        "patchclamp_server.cli.option_types",
        "if not 1.0 < value <",
        "if not 1.0 <= value <",
        "a slowdown of 1 is taken, which leaves analysis no time beside serving",
        ("rpc/test_config.py::test_the_slowdown_beside_analysis_is_a_number_above_1",),
    ),
    Mutant(
        "prefix-cache-stays-on",
        "patchclamp_server.cli.options",
        'engine["enable_prefix_cache"] = given["prefix_cache"] == "on"',
        'engine["enable_prefix_cache"] = given["prefix_cache"] in ("on", "off")',
        "--prefix-cache off changes nothing",
        ("rpc/test_config.py::test_the_prefix_cache_can_be_turned_off",),
    ),
]
