"""Any OpenAI-compatible server, asked over HTTP."""
