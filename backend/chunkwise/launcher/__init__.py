"""Starts the processes of one machine and keeps them together: when one ends, all end."""
