"""This has the file formats of artifacts, a module each; registry.py has them by name."""
