"""From files and messages to tensors and token ids, and from token ids back to text."""
