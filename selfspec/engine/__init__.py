"""Who runs a plan: one package (or file) an engine, behind the protocol in ``base.py``.

Here belong sessions that decode requests as they come, and what adapts torch, Hugging Face's ``generate``, vLLM, any
OpenAI-compatible server and a simulation to that protocol. How tokens are drafted and verified is ``speculation``'s.
"""
