"""Tests of mergetool.anatomy."""
