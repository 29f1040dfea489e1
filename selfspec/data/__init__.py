"""Where models and prompts come from: sources, verified copies of them on this disk, and prompts chosen from those."""
