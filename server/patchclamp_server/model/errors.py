"""What can go wrong before a model serves: at start-up, shown to the operator, not to a client of the rpc layer."""


class ModelSourceError(Exception):
    """The model cannot be had or must not be loaded. The message says what would be accepted."""
