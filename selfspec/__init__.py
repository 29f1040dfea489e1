"""selfspec: experiments in (self-)speculative decoding, composed in Hydra and measured honestly."""

__version__ = "0.1.0"
