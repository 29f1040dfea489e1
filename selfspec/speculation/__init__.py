"""The science of speculative decoding: what to draft, when to stop, how far, and which tokens stand.

Here belong the decode step, drafts, gates, controllers, policies, and heads that are fitted for drafts. It knows the
model, and neither plans nor engines: the vLLM plugin imports this and ``selfspec.model`` alone.
"""
