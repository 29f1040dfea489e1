"""Whether a key-value cache holds what it must, for tests that run a model on one."""

from selfspec.model.cache import KVCache


def check(cache: KVCache, layers: int) -> None:
    """Every verified token of every row must have keys and values in the first ``layers`` layers, finite and not zero.

    What is not verified is wiped, so that the next check finds a layer that was not run, and any that reads there.

    Raises:
        AssertionError: with the layer and row that have none.
    """
    kv = cache.kv[:layers]
    for row, length in enumerate(cache.lengths):
        assert 0 <= length <= cache.capacity, f"row {row}: length {length} of {cache.capacity}"
        held = kv[:, :, row, :, :length]
        for missing, right in (("finite", held.isfinite()), ("written", held.ne(0).any(-1))):
            wrong = [layer for layer, fine in enumerate(right.flatten(1).all(1).tolist()) if not fine]
            assert not wrong, f"layer {wrong[0]}, row {row}: not {missing}"
        kv[:, :, row, :, length:] = 0
    kv[:, :, len(cache.lengths) :] = 0
