"""This makes GGML blocks of float32 weights: the best scales that a search finds, and the codes under them."""
