"""What a worker's device does to the figures, a file for each measurement. ``device`` is ``cuda:0``; with ``cpu`` everything runs too, and means little."""
