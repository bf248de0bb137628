"""Inputs that nobody meant, in numbers that no test lane has time for; a slice of each runs with the tests."""
