"""The parts of benchmarks/gpu: one op a file, the engine, the baselines, and what they share."""
