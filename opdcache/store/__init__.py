"""The one door to storage, Parquet and Zarr: codec, shards, commit, claims."""
