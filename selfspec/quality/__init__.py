"""Is it still good? Perplexity, lm-eval and the gates' signals, measured through an engine (``docs/quality.md``)."""
