"""Where Palindrome runs: the connection to a Ray cluster. Imports nothing in-house."""
