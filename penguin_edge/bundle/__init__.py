"""A bundle: its contract, its manifest as data with a rule for each field, and the folder it is written into."""
