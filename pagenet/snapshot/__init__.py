"""Snapshots in layers: memory in a directory of objects, each layer with only what has changed
(docs/snapshot-format.md)."""
