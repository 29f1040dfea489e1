"""Gates, one file each: keep drafting, or stop now?

A gate looks at each token the draft is about to propose; a token it doubts is not proposed, nor any after it.
"""
