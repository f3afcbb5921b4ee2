"""The parts of benchmarks/sparse: the models, and what is measured of them."""
