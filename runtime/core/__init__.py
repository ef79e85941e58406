"""What sessions and streams are made of: features, prefill, decoding, turns, media, options."""
