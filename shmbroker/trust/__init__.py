"""Products that need not be believed: exact arithmetic in the integers modulo 2^32, and the check of it. Both workers import it."""
