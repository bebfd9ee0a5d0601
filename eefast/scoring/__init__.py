"""Images in, answers out: a few at once, or any number on many processes, resumable."""
