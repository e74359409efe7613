"""The commands of `gapstream`, a file for each; `arguments` is shared, `serve_kafka` is the second half of `serve`."""
