"""The parts of benchmarks/sparse.py: the models, and what is measured of them."""
