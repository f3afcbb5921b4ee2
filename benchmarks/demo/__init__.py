"""The parts of benchmarks/demo.py, and how they print."""
