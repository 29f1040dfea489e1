"""What concerns a sweep and not its jobs: composing them, checks before anything runs, a table at the end."""
