"""The data set of penguin-nano: pictures and clips with questions, and combinations that training never sees."""
