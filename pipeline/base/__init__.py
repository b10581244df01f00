"""What every room may use: errors, interruption, threads, text, logging. Imports nothing in-house."""
