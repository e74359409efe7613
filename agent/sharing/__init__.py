"""One update by several processes: the list of them, what the trainer gives them, and what they do."""
