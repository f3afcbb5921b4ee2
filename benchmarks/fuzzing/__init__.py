"""What fuzz.py makes at random: calls, texts, files, chat templates and models; and how long what it asks for takes."""
