"""Brings labelled images in; knows nothing of learning."""
