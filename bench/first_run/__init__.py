"""The first run on somebody's GPU: everything worth knowing, most important first, in as much time as there is."""
