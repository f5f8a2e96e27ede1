"""Tests of mergetool.storage."""
