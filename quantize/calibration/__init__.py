"""What quantization learns from data: statistics of activations, and the data."""
