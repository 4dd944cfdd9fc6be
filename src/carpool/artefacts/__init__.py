"""What is read from and written to disk: files, texts, statistics."""
