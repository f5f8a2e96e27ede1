"""The version of mergetool."""

__version__ = "0.1.0"
