"""Pictures of results. They need matplotlib (extra `plot`), which is imported when one is drawn."""
