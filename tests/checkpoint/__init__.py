"""Tests of mergetool.checkpoint."""
