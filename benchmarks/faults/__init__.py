"""The parts of benchmarks/faults.py: its rows, their clients, and a server that fails when it is told to."""
