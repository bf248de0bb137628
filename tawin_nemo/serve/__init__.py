"""The generation server: HTTP in front of one engine, many requests in one search, two planes."""
