"""The gateway: an OpenAI-compatible server over our engine and others."""
