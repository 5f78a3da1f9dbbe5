"""The first run on a user's GPU: all checks and measurements, the most important first, within a time limit."""
