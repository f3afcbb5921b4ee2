"""The parts of benchmarks/faults: its rows, their clients, and a server that fails when it is told to."""
