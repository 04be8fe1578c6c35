"""What every room may use: paths, files, JSON, random numbers, the machine."""
