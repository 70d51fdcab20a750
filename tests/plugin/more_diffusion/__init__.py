"""Adds one implementation of each kind from outside the project; docs/extending.md shows these files."""
