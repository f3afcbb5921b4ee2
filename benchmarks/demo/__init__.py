"""The parts of benchmarks/demo, and how they print."""
