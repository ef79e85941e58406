"""Text: the chat format, image placeholders and the tokenizer."""
