"""What serving a model takes of memory is planned before its weights are read."""
