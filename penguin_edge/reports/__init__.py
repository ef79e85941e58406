"""Reports for people: drawings of plans and of measurements."""
