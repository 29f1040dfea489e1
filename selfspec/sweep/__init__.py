"""What concerns a sweep and not its jobs: composing them, what they are told of it, checks before and a table after."""
