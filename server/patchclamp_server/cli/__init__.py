"""The commands of the server: serve, pull and token."""
