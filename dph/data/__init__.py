"""From a line of a file to a packed batch."""
