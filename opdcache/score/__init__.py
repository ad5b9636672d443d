"""The score stage: teacher log-probs of every completion token, as Zarr shards."""
