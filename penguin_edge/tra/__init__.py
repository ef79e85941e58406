"""Token compression: key frames, the sizes of a clip's or a stream's frames, and prompts with several media."""
