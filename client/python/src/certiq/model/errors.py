"""Errors that the tools on models report to their users."""


class UsageError(Exception):
    """Something asked for cannot be done; the message says what was expected and what came."""
