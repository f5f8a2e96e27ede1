"""Text to meaning: schema, settings, load with line and column."""
