"""What every room stands on: configuration, errors, files and texts. Knows no model."""
