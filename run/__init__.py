"""What a run leaves, and what ends it."""
