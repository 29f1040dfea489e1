"""The frozen model: weights in, logits out.

Here belongs what runs layers over tokens and keeps their keys and values (own Llama layers and kernels, Hugging Face's,
the KV cache, a tree of tokens and its mask) and what reads weights from disk. Nothing here drafts, verifies or samples.
"""
