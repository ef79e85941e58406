"""Engines: loaded graphs behind one protocol, and the KV caches that they keep."""
