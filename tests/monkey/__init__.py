"""What an adversary does to gapstream: kills, faults of the disk, records and images, all from a seed. See __main__."""
