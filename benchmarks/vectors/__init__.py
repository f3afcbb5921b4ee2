"""What vectors do and cost; see __main__.py."""
