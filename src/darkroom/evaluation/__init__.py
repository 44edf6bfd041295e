"""Scores: the protocol that makes them comparable, features, distances."""
