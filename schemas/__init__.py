"""The data contract: columns, arrays, manifests, run files, losses. Torch-free, storage-free.

Every other layer takes its names from here; nothing here knows how a thing is stored or computed.
"""

SCHEMA_VERSION = 1
"""Major version of the shard format. Readers refuse a larger one; see ``docs/format.md``."""
