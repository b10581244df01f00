"""Where Palindrome runs: connection to a Ray cluster, submission, node providers. Imports pipeline/base only."""
