"""Looking at a broker from outside: metrics, top, map."""
