"""Acceptance policies, one file each: which drafted tokens stand? Pure functions of the draft and the target's logits.

Exact ones (``longest_prefix``, ``rejection``) keep to what the target alone would have said; relaxed ones
(``conf_threshold``, ``topk_agree``, ``typical``) let a token stand that the target merely does not mind.
"""
