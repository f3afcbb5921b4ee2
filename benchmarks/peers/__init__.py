"""The parts of benchmarks/peers: environments, workers, cases, rounds, and what is made of the figures."""
