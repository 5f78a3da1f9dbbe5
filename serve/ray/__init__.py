"""`afnext serve --ray`: the same HTTP application over any number of replicas on Ray Serve."""
