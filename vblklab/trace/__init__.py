"""Recording, statistics, and the Run that a machine returns."""
