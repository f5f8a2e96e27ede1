"""Tests of mergetool.publish."""
