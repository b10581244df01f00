"""Errors, interruption, threads, text, logging, for all other rooms. Imports nothing in-house."""
