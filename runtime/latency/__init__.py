"""A latency target: what this machine takes, what the next frames will ask of it, and which setting that leaves."""
