"""The parts of benchmarks/gpu.py: one op a file, the engine, the baselines, and what they share."""
