"""A model split over two processes, a file for each thing that is measured of it."""
