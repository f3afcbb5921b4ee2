"""The parts of the benchmark of neurons."""
