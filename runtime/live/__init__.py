"""Streams that run: the worker, sources of frames, the live view."""
