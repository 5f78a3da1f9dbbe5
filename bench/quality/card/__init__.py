"""The datasets of the model card and article in their published layouts, and their scoring."""
