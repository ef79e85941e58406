"""Pictures and clips as frames: which files are opened and how large, decoding, clocks, resizing, patches."""
