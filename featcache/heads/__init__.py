"""Arrays in; head and scores out. No file, no image."""
