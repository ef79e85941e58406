"""Streams that run: the worker, sources of frames, the latency controller, the live view."""
