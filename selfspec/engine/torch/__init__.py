"""Our own engine: the decode step on one device, with continuous batching."""
