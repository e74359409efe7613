"""Learns: the only package that knows the other two."""
