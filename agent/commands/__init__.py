"""The commands of `gapstream`, one file each; agent/cli.py lists them."""
