"""The datasets of the model card and article in the layouts in which they are published, and their scoring."""
