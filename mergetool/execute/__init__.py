"""Work to folders: conveyor, measures, journal, devices."""
