"""What is wrong with a file of the operator."""


class ConfigurationError(Exception):
    """A file that cannot be used; the message names the file, the place in it, and what would be accepted."""
