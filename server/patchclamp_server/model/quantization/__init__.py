"""Dense weights become GGML blocks while they load: in which formats, and what that costs."""
