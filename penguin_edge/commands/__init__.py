"""One file per verb of the command line: `add` declares its flags, `run` does it and returns the exit code."""
