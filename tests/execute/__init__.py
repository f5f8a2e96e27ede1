"""Tests of mergetool.execute."""
