"""What is scored after every update, by which formulas, and on which images."""
